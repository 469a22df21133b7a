"""The example policies: valid, complete where they say so, and right for the configurations they are for. A second."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml
from pydantic import BaseModel

from autoscale.fleet import fleet_of
from autoscale.policy_file import check_against, read
from autoscale.schedule import in_force
from autoscale.spec import PolicySpec
from cluster.config import AppConfig, parse_args

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "autoscale" / "policies"
POLICIES = sorted(FOLDER.glob("*.yaml"))
CONFIGS = ROOT / "deployments" / "configs"


def config(name: str) -> AppConfig:
    """A configuration of ours with everything elastic."""
    args = yaml.safe_load((CONFIGS / name).read_text())["applications"][0]["args"]
    for part in (args["experts"], args["router"]):
        part["replicas"] = "elastic"
    for pool in args["experts"].get("pools", {}).values():
        pool.pop("replicas", None)
    return parse_args(args)


def keys_below(part: Any) -> set[str]:
    """All keys in a document, at any depth."""
    if isinstance(part, list):
        return {key for item in part for key in keys_below(item)}
    return {*part, *(key for value in part.values() for key in keys_below(value))} if isinstance(part, dict) else set()


def test_the_examples_are_those_the_documentation_names() -> None:
    names = ["bursty", "cost-capped", "default", "elastic", "mixed-gpu", "office-hours"]
    assert [path.stem for path in POLICIES] == names


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
def test_an_example_is_valid_and_changes_what_its_comments_explain(path: Path) -> None:
    spec = read(path)
    assert (spec == PolicySpec(version=1)) == (path.stem == "default")


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
def test_each_part_of_an_example_says_why(path: Path) -> None:
    """A comment above it, beside it or inside it."""
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    for number, line in enumerate(lines):
        top = line and not line.startswith((" ", "#", "version"))
        if top:
            block = [lines[number - 1], line]
            for below in lines[number + 1 :]:
                if below and not below.startswith((" ", "#")):
                    break
                block.append(below)
            assert any("# " in each for each in block), line


def test_default_states_every_key_with_its_default() -> None:
    text = (FOLDER / "default.yaml").read_text()
    written = yaml.safe_load(text)
    assert_states_all(PolicySpec(version=1), written, "policy")


def assert_states_all(model: BaseModel, written: dict[str, Any], place: str) -> None:
    assert set(written) == set(type(model).model_fields), place
    for key, value in model:
        if isinstance(value, BaseModel):
            assert_states_all(value, written[key], f"{place}.{key}")
        else:
            assert written[key] == (list(value) if isinstance(value, tuple) else value), f"{place}.{key}"


def test_the_examples_in_the_comments_of_default_are_valid_and_complete() -> None:
    """What has no default of its own, rules, pools and entries, stands in comments indented as YAML."""
    lines = (FOLDER / "default.yaml").read_text().splitlines()
    examples = yaml.safe_load("\n".join(line[1:] for line in lines if line.startswith("#   ")))
    spec = PolicySpec.model_validate({"version": 1, **examples})
    assert spec.groups
    assert spec.schedule
    assert {"cost", "max_replicas"} <= keys_below(examples["pools"])
    assert {"cron", "timezone", "duration_s", "groups", "router"} == set(examples["schedule"][0])


@pytest.mark.parametrize(
    ("policy", "configuration"),
    [(path.stem, "elastic.yaml") for path in POLICIES if path.stem in ("default", "elastic")]
    + [(path.stem, "demo.yaml") for path in POLICIES if path.stem != "mixed-gpu"]
    + [("mixed-gpu", "mixed-gpu.yaml"), ("default", "mixed-gpu.yaml")],
)
def test_an_example_suits_the_configuration_it_is_for(policy: str, configuration: str) -> None:
    assert check_against(read(FOLDER / f"{policy}.yaml"), fleet_of(config(configuration))) == []


def test_mixed_gpus_do_not_suit_a_cluster_without_their_pool() -> None:
    errors = check_against(read(FOLDER / "mixed-gpu.yaml"), fleet_of(config("demo.yaml")))
    assert {error.split(":")[0] for error in errors} == {"budget.gpus", "pools"}


def test_elastic_reacts_within_seconds() -> None:
    spec = read(FOLDER / "elastic.yaml")
    scaling = spec.scaling("experts-0")
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 3)
    assert (scaling.upscale.after_s, scaling.upscale.max_step) == (1, 2)
    assert (scaling.downscale.after_s, scaling.downscale.max_step) == (8, 1)
    assert scaling.startup.budget_s == spec.router.startup.budget_s == 60
    assert (spec.signals.window_s, spec.budget.replicas, spec.router.max_replicas) == (4, 8, 2)


def test_office_hours_are_those_of_berlin() -> None:
    spec = read(FOLDER / "office-hours.yaml")
    bounds = {}
    for hour in ("07:44", "07:45", "08:30", "10:00", "13:30", "17:44", "17:45"):
        for day in ("2026-01-14", "2026-07-15"):
            at = datetime.fromisoformat(f"{day}T{hour}").replace(tzinfo=ZoneInfo("Europe/Berlin"))
            scaling = in_force(spec, at).scaling("experts-0")
            bounds[day, hour] = (scaling.min_replicas, scaling.max_replicas)
    expected = [(1, 2), (2, 6), (3, 6), (2, 6), (3, 6), (2, 6), (1, 2)]
    assert [found for (day, _), found in bounds.items() if day.endswith("14")] == expected
    assert [found for (day, _), found in bounds.items() if day.endswith("15")] == expected
