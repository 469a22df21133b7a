"""The Router's shell around a real runtime, without Serve: what it says of itself. About 3 s."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.blueprint import make_blueprint
from cluster.membership import Address, Epoch, Replica, State, View
from cluster.metrics import GENERATED_TOKENS, PROMPT_TOKENS, SENT_ROWS, VIEW_READY_REPLICAS
from deployments.router.deployment import Router
from deployments.router.load import LoadMeter, LoadReporter
from deployments.router.runtime import RouterRuntime
from tests import models
from tests.deployments.router.fake_backbone import FakeClock, make_request, run_until_idle, submit
from tests.parity.split_model import config
from tests.recorder import Recorder

HERE = Address("n", "s", "", 0)
TOKENS, PROMPT = 4, list(range(10, 43))


@pytest.mark.parametrize("local", [True, False])
def test_stats_and_loads_are_those_of_the_runtime(tmp_path: Path, local: bool) -> None:
    args = config(models.save("deepseek_v3", tmp_path), "float32", transport="local")
    runtime = RouterRuntime(make_blueprint(args), args.experts, args.router, key=b"k", node="n")
    groups = () if local else args.experts.group_names
    # Not an instance: its asynchronous `__del__` is for Serve to await.
    router = SimpleNamespace(
        _id="r",
        _model={"digest": "ab" * 32},
        _runtime=runtime,
        _meter=LoadMeter("r"),
        _reporter=LoadReporter(groups, FakeClock()),
        _groups=groups,
        _link=SimpleNamespace(view_age_s=1.5),
        _view=View(Epoch("a", 1), (Replica("x", "experts-0", "p", HERE, "d", 1.0, State.READY),)),
    )
    shell: Any = Router.func_or_class
    submit(runtime.engine, make_request(PROMPT, max_tokens=TOKENS, ignore_eos=True))
    waiting = shell.record_autoscaling_stats(router)
    run_until_idle(runtime.engine)
    report = shell.record_autoscaling_stats(router)
    loads = shell._loads(router)
    recorder = Recorder()
    shell._tell(router, recorder.meter)
    runtime.stop()

    assert (waiting["seq"], waiting["waiting"], waiting["running"], waiting["steps"]) == (1.0, 1.0, 0.0, 0.0)
    assert waiting["ttft_p95_ms"] >= 0, "it waits, and nobody has had a first token"
    assert "tpot_p95_ms" not in waiting
    # The prompt of 33 takes two chunks; the last token is never fed back. One MoE layer, two experts a token.
    assert (report["seq"], report["steps"], report["tokens"]) == (2.0, 1.0 + TOKENS, float(TOKENS))
    assert report["step_s"] > 0 < report["ttft_p95_ms"]
    assert report["tpot_p95_ms"] > 0
    assert (report["waiting"], report["running"], report["kv_used_share"]) == (0.0, 0.0, 0.0)
    rows = 2 * (len(PROMPT) + TOKENS - 1)
    assert sum(value for key, value in report.items() if key.startswith("rows:")) == (0 if local else rows)
    assert {key.partition(":")[2] for key in report if ":" in key} == set(groups)
    assert (loads.router, loads.digest) == ("r", "ab" * 32)
    assert not loads.last
    assert {layer: (len(each), each.sum()) for layer, each in loads.rows.items()} == {1: (models.EXPERTS, rows)}
    assert shell._stats(router).group_rows == {
        name: traffic.rows for name, traffic in runtime.dispatcher.stats().groups.items()
    }
    published = sum(recorder.of(SENT_ROWS, group=name) for name in args.experts.group_names)
    assert (published, recorder.of(GENERATED_TOKENS), recorder.of(PROMPT_TOKENS)) == (rows, TOKENS, len(PROMPT))
    ready = [recorder.of(VIEW_READY_REPLICAS, group=name) for name in groups]
    assert ready == [float(name == "experts-0") for name in groups]
