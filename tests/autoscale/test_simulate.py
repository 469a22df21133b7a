"""The command: what it prints, and the one sentence it says when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autoscale.simulate import main
from autoscale.simulation.report import percentiles, sparkline
from tests.autoscale.simulation.worlds import steady

POLICY = "autoscale/policies/default.yaml"


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """60 s of 3 requests a second."""
    path = tmp_path / "trace.jsonl"
    made = steady(3, 60)
    rows = zip(made.arrival_s.tolist(), made.prompt_tokens.tolist(), made.generated_tokens.tolist(), strict=True)
    path.write_text(
        "".join(
            json.dumps({"timestamp": 1e3 * at, "input_length": prompt, "output_length": generated}) + "\n"
            for at, prompt, generated in rows
        )
    )
    return str(path)


def test_a_run_prints_what_was_assumed_and_what_came_out(trace: str, capsys: pytest.CaptureFixture[str]):
    assert main(["--policy", POLICY, "--trace", trace, "--decisions"]) == 0
    out = capsys.readouterr().out
    assert "hop_s = 0.000278: infra/bench/README.md" in out
    assert "SLO        first token in 6000 ms" in out
    assert "180 requests" in out
    assert "default" in out
    assert "Router" in out


def test_json_is_one_line_and_the_same_for_the_same_seed(trace: str, capsys: pytest.CaptureFixture[str]):
    texts = []
    for seed in ("0", "0", "1"):
        assert main(["--policy", POLICY, "--trace", trace, "--json", "--seed", seed]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["policies"][0].pop("wall_s") >= 0
        texts.append(json.dumps(found))
    assert texts[0] == texts[1] != texts[2]
    (policy,) = json.loads(texts[0])["policies"]
    assert policy["requests"] == policy["done"] == 180
    assert policy["gpu_hours"] > 0
    assert len(policy["devices"]["at_s"]) == len(policy["devices"]["held"])


def test_a_comparison_has_four_baselines_a_verdict_and_a_picture(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "run.png"
    options = ["--compare", "--plot", str(picture), "--json", "--also", "autoscale/policies/bursty.yaml"]
    assert main(["--policy", POLICY, "--trace", trace, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [policy["policy"] for policy in found["policies"]]
    assert names == [
        "default",
        "bursty",
        "whole model, ongoing requests",
        "Serve's formula per group",
        "static peak",
        "static mean",
    ]
    ours, whole = found["policies"][0], found["policies"][2]
    assert whole["slo_kept"] >= ours["slo_kept"]
    saved = 1 - ours["gpu_hours"] / whole["gpu_hours"]
    assert f"{abs(saved):.0%} {'fewer' if saved >= 0 else 'MORE'} GPU-hours" in found["verdict"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--trace", "none.csv"], "the trace none.csv cannot be read: No such file or directory."),
        (["--policy", "none.yaml"], "none.yaml: the file cannot be read: No such file or directory"),
        (["--scenario", "none.yaml"], "the file none.yaml cannot be read: No such file or directory."),
        (["--calibration", "none.yaml"], "the file none.yaml cannot be read: No such file or directory."),
        (["--rate-scale", "0"], "--rate-scale 0 is not allowed; allowed: 0.0001 to 10000."),
        (["--repeat-to", "nan"], "--repeat-to nan is not allowed; allowed: 0.01 to 168."),
        (["--seed", "-1"], "--seed -1 is not allowed; allowed: 0 or more."),
        (["--plot", "/nowhere/x.png"], "the picture /nowhere/x.png cannot be written: No such file or directory."),
    ],
)
def test_an_error_is_one_sentence_and_exit_status_1(
    trace: str, capsys: pytest.CaptureFixture[str], change: list[str], said: str
):
    assert main(["--policy", POLICY, "--trace", trace, *change]) == 1
    caught = capsys.readouterr()
    assert said in caught.err
    assert caught.err.count("\n") == 1
    assert caught.out == ""


def test_percentiles_of_what_never_ended_are_infinite():
    import numpy as np

    assert percentiles(np.array([1.0, 2.0, np.nan, np.inf])) == (2.0, np.inf, np.inf)


def test_a_sparkline_is_as_high_as_its_values():
    import numpy as np

    assert sparkline(np.array([0.0, 4.0, 8.0]), 3) == " ▄█"
    assert sparkline(np.array([1.0, 1.0]), 8, top=8) == "▁▁"
    assert sparkline(np.zeros(3)) == "   "


def test_a_budget_left_to_the_cluster_is_refused_as_there_is_none(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    policy = tmp_path / "p.yaml"
    policy.write_text("version: 1\nbudget: {gpus: cluster}\n")
    assert main(["--policy", str(policy), "--trace", trace]) == 1
    assert "budget.gpus: the value 'cluster' is not allowed: a simulation has no cluster" in capsys.readouterr().err
