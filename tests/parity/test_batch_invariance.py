"""`router.batch_invariant`, bit for bit: what is said alone is said everywhere, in 32 and in 16 bits.

Alone means: one request at a time, its prompt in one piece, experts in the router's own process. Everything else must
give the same tokens with the same log-probabilities, as floats, of the twenty most probable ones. About 40 s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.blueprint import Blueprint, make_blueprint
from cluster.config import AppConfig
from cluster.membership import View
from deployments.generation import GenerationRequest
from tests.expert_pool import ExpertPool, view_of
from tests.models import save
from tests.parity import split_model
from tests.parity.bits import Said, request_of, resumed, talking

TOKENS = 14
MODELS = ("mixtral", "deepseek_v3", "gpt_oss", "qwen3_moe")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One model in one arithmetic, and what it says alone."""

    folder: Path
    dtype: str
    requests: list[GenerationRequest]
    alone: list[list[Said]]

    def deployed(self, pool: ExpertPool, **router: Any) -> tuple[AppConfig, Blueprint, View]:
        """Expert processes that serve it. groups: as in `config`; the rest are settings of the router."""
        args = split_model.config(self.folder, self.dtype, **{"batch_invariant": True, **router})
        blueprint = make_blueprint(args)
        on = args.router.batch_invariant
        return args, blueprint, view_of(pool.serve(blueprint, args.experts, batch_invariant=on))


@pytest.fixture(scope="module")
def pool() -> Iterator[ExpertPool]:
    with ExpertPool(4) as pool:
        yield pool


@pytest.fixture(scope="module", params=[f"{model}-{dtype}" for model in MODELS for dtype in DTYPES])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    model_type, dtype = request.param.split("-")
    folder = save(model_type, tmp_path_factory.mktemp(model_type), getattr(torch, dtype))
    args = split_model.config(
        folder, dtype, groups=1, transport="local", batch_invariant=True, max_batch_tokens=256, max_sequences=1
    )
    requests = [request_of(number, prompt, TOKENS) for number, prompt in enumerate(split_model.prompts())]
    with talking(args, make_blueprint(args), None) as talk:
        alone = talk.alone(requests)
    assert len({tuple(token for token, _, _ in said) for said in alone}) == len(alone)
    return Case(folder, dtype, requests, alone)


def test_in_a_batch_over_sockets_and_after_a_resume_at_any_token(case: Case, pool: ExpertPool) -> None:
    """Four groups. Requests join one by one; then each token of one answer is where another router takes over."""
    with talking(*case.deployed(pool)) as talk:
        assert talk.together(case.requests, one_by_one=True) == case.alone
        longest = max(range(len(case.requests)), key=lambda number: len(case.requests[number].tokens))
        said = case.alone[longest]
        again = [resumed(case.requests[longest], said, after) for after in range(1, TOKENS)]
        assert talk.together(again) == [said[after:] for after in range(1, TOKENS)]


def test_in_other_groups_replicas_and_chunks_and_after_preemption(case: Case, pool: ExpertPool) -> None:
    """Two groups of two replicas, two routers whose pools are too small, prompts in pieces of nine tokens and fewer."""
    deployed = case.deployed(pool, groups=2, max_batch_tokens=9, kv_tokens=64, max_wait_share=100)
    with talking(*deployed, routers=2) as talk:
        assert talk.together(case.requests) == case.alone
        assert talk.preemptions > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_it_bits_do_depend_on_the_batch(dtype: str, pool: ExpertPool, tmp_path: Path) -> None:
    """Else the tests above would prove nothing."""
    save("deepseek_v3", tmp_path, getattr(torch, dtype))
    requests = [request_of(number, prompt, TOKENS) for number, prompt in enumerate(split_model.prompts())]
    case = Case(tmp_path, dtype, requests, [])
    with talking(*case.deployed(pool, batch_invariant=False)) as talk:
        assert talk.together(requests, one_by_one=True) != talk.alone(requests)
