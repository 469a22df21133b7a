"""Scenario and calibration files: the shipped ones are right, wrong ones get a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoscale.simulation.domains import expert_loads, group_shares
from autoscale.simulation.scenario import CALIBRATION, FOLDER, read_calibration, read_scenario
from cluster.errors import ConfigError

SHIPPED = sorted(path.stem for path in (FOLDER / "scenarios").glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_scenarios_are_valid_and_their_loads_fit(name: str):
    scenario = read_scenario(Path(name))
    assert scenario.name == name
    shares = group_shares(expert_loads(scenario.model, 0), scenario.model.groups, scenario.model.placement)
    assert shares.sum(axis=2) == pytest.approx(1.0)


def test_every_constant_says_where_it_is_from_and_a_scenario_overrides_only_what_it_names():
    calibration = read_calibration()
    scenario = read_scenario(Path("large"))
    measured, used = read_scenario(Path("emulated")).constants(calibration), scenario.constants(calibration)
    assert {key for key in used if used[key] != measured[key]} == {"token_s"}
    assert used["token_s"] == scenario.override.token_s


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("groups: 4\n", "groups: 17\n"), "model: "),
        (("layers: 4\n", "layers: 0\n"), "model.layers: 0 is wrong: Input should be greater than or equal to 1."),
        (("default: {", "other: {"), "needed: one of the name 'default'"),
        (("ttft_ms: 6000", "ttft_ms: -1"), "slo.ttft_ms: -1 is wrong: Input should be greater than 0."),
        (("version: 1\n", "version: 1\nspeed: 3\n"), "speed: 3 is wrong: Extra inputs are not permitted."),
        (("version: 1\n", "version: [1\n"), "is not valid YAML."),
    ],
)
def test_a_wrong_scenario_is_one_sentence(tmp_path: Path, change: tuple[str, str], said: str):
    text = (FOLDER / "scenarios" / "emulated.yaml").read_text().replace(*change)
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_scenario(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_constant_without_a_source_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot be read: No such file"):
        read_scenario(tmp_path / "none.yaml")
    path = tmp_path / "calibration.yaml"
    path.write_text(CALIBRATION.read_text().replace('  source: "infra/bench/README.md, T=8', '  sauce: "T=8'))
    with pytest.raises(ConfigError, match=r"hop_s.source: Field required."):
        read_calibration(path)
