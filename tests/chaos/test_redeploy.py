"""A config is redeployed, and a group scaled down, while streams run: none breaks, none changes, no weights are mixed.

One server. Its devices are emulated, slow enough for a stream to outlast a rollout; what they compute is real. The
tests build on each other: the last one leaves another model behind.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.chaos.redeploying import Newcomers, Redeployable, redeployable
from tests.chaos.streams import Asked, Streams
from tests.e2e.conftest import CHECKPOINT, WholeModel
from tests.e2e.load import PROMPTS
from tests.serving import wait_for

GROUPS = 2
ROWS_PER_S = 180
TOKENS = 170
LONG = [Asked(prompt, None, TOKENS) for prompt in (*PROMPTS["python"][:4], *PROMPTS["chinese"][:4])]
SHORT = [Asked(PROMPTS[domain][4], None, 10) for domain in ("python", "chinese")]
LEFT_S = 20.0
"""Until the last process of an old version is gone, once nobody needs it: a router must first be missed, or say so."""
SCALED_S = 4.0


def slow(application: dict[str, Any]) -> None:
    """Two groups, of which experts-0 has a replica too many."""
    experts = application["args"]["experts"]
    experts |= {"groups": GROUPS, "placement": "contiguous", "emulate": {"rows_per_s": ROWS_PER_S}}
    application["deployments"] = [{"name": "experts-0", "num_replicas": 2}]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redeployable]:
    with redeployable(tmp_path_factory.mktemp("redeploy"), slow) as started:
        yield started


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with other weights in its experts, under the same name of its folder's files."""
    folder = tmp_path_factory.mktemp("other") / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if ".mlp.experts." in name:
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
            tensors[name] = (tensor.float() + noise).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def answers_of(model: WholeModel) -> Callable[[Asked], str]:
    return lambda asked: model.continued(asked.prompt, asked.max_tokens)


def test_a_group_is_scaled_down_in_mid_stream(
    running: Redeployable, whole_model: WholeModel, record_property: Any
) -> None:
    wanted = {asked: answers_of(whole_model)(asked) for asked in [Asked(each.prompt, None, 60) for each in LONG]}
    streams = Streams(running.server.port, list(wanted))

    def one_less(application: dict[str, Any]) -> None:
        application["deployments"] = [{"name": "experts-0", "num_replicas": 1}]

    with streams.running():
        before = running.pids()["experts-0"]
        assert len(before) == 2
        running.deploy(one_less)
        deployed = time.monotonic()
        wait_for(lambda: len(running.pids()["experts-0"]) == 1, SCALED_S + 10, "one replica less")
        left_s = time.monotonic() - deployed
        assert streams.alive == len(LONG), "the streams ended before the replica did"
    assert not streams.differences(wanted)
    record_property("scaled down after s", round(left_s, 1))
    assert left_s <= SCALED_S
    assert running.pids()["experts-0"] < before, "the others were restarted"


def test_a_harmless_change_is_rolled_out_under_streams_that_never_notice(
    running: Redeployable, whole_model: WholeModel, record_property: Any
) -> None:
    right = answers_of(whole_model)
    wanted = {asked: right(asked) for asked in LONG}
    short = {asked: {right(asked)} for asked in SHORT}
    streams, newcomers = Streams(running.server.port, LONG), Newcomers(running.server.port, SHORT, short.__getitem__)
    before, digest = running.pids(), running.cluster()["digest"]
    with newcomers.asking(), streams.running():
        since = time.monotonic()
        running.deploy(lambda application: application["args"]["router"].update(max_sequences=48))
        running.wait_for_successors(before)
        alive, rollout_s = streams.alive, time.monotonic() - since
        # Old routers go on with the experts of the new version, which have the same weights: the old ones may go.
        running.wait_for_departure({name: before[name] for name in ("experts-0", "experts-1")}, LEFT_S)
    record_property("rollout s, streams s", (round(rollout_s), round(max(t.times[-1] for t in streams.told) - since)))
    record_property("newcomers: answers, longest s", (len(newcomers.answers), round(newcomers.longest_s, 1)))
    assert alive == len(LONG), "the streams ended before the rollout did"
    assert not streams.differences(wanted)
    assert not newcomers.failures
    assert len(newcomers.answers) > len(SHORT)
    assert running.cluster()["digest"] == digest
    record_property("the last old process gone after s", round(running.wait_for_departure(before, LEFT_S), 1))


def test_another_model_is_rolled_out_side_by_side_and_no_stream_sees_both(
    running: Redeployable, whole_model: WholeModel, other: Path, record_property: Any
) -> None:
    old, new = answers_of(whole_model), answers_of(WholeModel(other))
    wanted = {asked: old(asked) for asked in LONG}
    assert all(new(asked) != text for asked, text in wanted.items())
    short = {asked: {old(asked), new(asked)} for asked in SHORT}
    assert all(len(texts) == 2 for texts in short.values())
    streams, newcomers = Streams(running.server.port, LONG), Newcomers(running.server.port, SHORT, short.__getitem__)
    before, digest = running.pids(), running.cluster()["digest"]
    with newcomers.asking(), streams.running():
        since = time.monotonic()
        running.deploy(lambda application: application["args"]["model"].update(path=str(other)))
        running.wait_for_successors(before)
        alive, rollout_s = streams.alive, time.monotonic() - since
        shown = wait_for(lambda: _both(running, digest), 10, "both versions in /v1/cluster")
        running.server.get("/health")
        rolled_out = time.monotonic()
    record_property("rollout s, streams s", (round(rollout_s), round(max(t.times[-1] for t in streams.told) - since)))
    record_property("newcomers: answers, longest s", (len(newcomers.answers), round(newcomers.longest_s, 1)))
    assert alive == len(LONG), "the streams ended before the rollout did"
    assert shown["digest"] != digest
    assert not streams.differences(wanted)
    assert not newcomers.failures
    late = [(asked, text) for at, asked, text in newcomers.answers if at > rolled_out + newcomers.longest_s]
    assert late
    assert all(text == new(asked) for asked, text in late)
    record_property("the last old process gone after s", round(running.wait_for_departure(before, LEFT_S), 1))
    assert not _both(running, digest)


def _both(running: Redeployable, old: str) -> dict[str, Any] | None:
    """`/v1/cluster` while every group has old experts that still serve beside ready new ones."""
    shown = running.cluster()
    for group in shown["groups"]:
        marks = {(replica.get("other_digest"), replica["state"]) for replica in group["replicas"]}
        if not {(None, "ready"), (old, "draining")} <= marks:
            return None
    return shown
