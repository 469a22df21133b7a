"""Parity over Ray's object store: the experts are actors, every batch of rows is an object, the tokens are the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from cluster.blueprint import Blueprint, make_blueprint
from cluster.config import AppConfig, ExpertsSpec
from cluster.membership import Epoch, Replica, View
from tests.expert_pool import KEY, NODE
from tests.models import save
from tests.parity.bits import request_of, talking
from tests.parity.split_model import TOKENS, answers, config, greedy, near_ties, prompts
from tests.reference import continuations


@ray.remote(num_cpus=0.1)
class ExpertActor:
    """Holds one `ExpertReplica` at a time."""

    def __init__(self) -> None:
        self._replica: Any = None

    def serve(self, blueprint: Blueprint, spec: ExpertsSpec, index: int, replica_id: str, **options: Any) -> Replica:
        from cluster.fabric.ray_references import RayReferences
        from cluster.fabric.store_codec import StoreCodec
        from deployments.experts.replica import ExpertReplica

        if self._replica is not None:
            self._replica.close()
        codec = StoreCodec(RayReferences())
        self._replica = ExpertReplica(
            blueprint, spec, index, replica_id=replica_id, key=KEY, node=NODE, references=codec, **options
        )
        record: Replica = self._replica.record()
        return record


@pytest.fixture(scope="module")
def actors() -> Iterator[list[Any]]:
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False)
    try:
        yield [ExpertActor.remote() for _ in range(4)]
    finally:
        ray.shutdown()


def served(actors: list[Any], args: AppConfig, blueprint: Blueprint) -> View:
    options = {"batch_invariant": args.router.batch_invariant}
    started = [
        actor.serve.remote(blueprint, args.experts, index, f"replica-{index}", **options)
        for index, actor in enumerate(actors)
    ]
    return View(Epoch("test", 1), tuple(ray.get(started, timeout=120)))


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss"])
def test_over_the_object_store_the_tokens_are_the_same(model_type: str, actors: list[Any], tmp_path: Path) -> None:
    save(model_type, tmp_path, torch.float32)
    args = config(tmp_path, "float32", transport="object_store")
    blueprint = make_blueprint(args)
    view = served(actors, args, blueprint)
    requests = [greedy(number, prompt) for number, prompt in enumerate(prompts())]
    outputs = answers(args, blueprint, view, requests)
    assert near_ties(continuations(tmp_path, torch.float32, prompts(), TOKENS), outputs) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_invariant_bits_are_the_same_over_the_object_store(dtype: str, actors: list[Any], tmp_path: Path) -> None:
    """As those of one request at a time with the experts in the router's own process."""
    save("deepseek_v3", tmp_path, getattr(torch, dtype))
    here = config(tmp_path, dtype, transport="local", batch_invariant=True)
    requests = [request_of(number, prompt, 8) for number, prompt in enumerate(prompts())]
    with talking(here, make_blueprint(here), None) as talk:
        alone = talk.alone(requests)
    args = config(tmp_path, dtype, transport="object_store", batch_invariant=True)
    blueprint = make_blueprint(args)
    with talking(args, blueprint, served(actors, args, blueprint)) as talk:
        assert talk.together(requests) == alone
