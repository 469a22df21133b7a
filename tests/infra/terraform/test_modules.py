"""Both Terraform modules: layout, `validate` against the providers' schemas, and their own tests with mocks.

AWS is validated by the real provider, Alibaba Cloud against its provider's schema only (alicloud_provider.py), nine of
its resources against alicloud-more.schema.json, written from that provider's documentation.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.terraform import chart_values
from tests.infra.terraform.terraform_runs import HERE, MODULES, Module, OwnTests, need_terraform

CLOUDS = ("aws", "alicloud")
# A wrong argument, block, type, a missing argument: (file, what is written, what instead, the complaint). None in what
# another depends on: Terraform does not look at a resource behind a wrong one.
MISTAKES = {
    "aws": [
        ("node_pools.tf", "capacity_type ", "capacity_kind ", "Unsupported argument"),
        ("node_pools.tf", "update_config {", "update_configuration {", "Unsupported block type"),
        ("model_bucket.tf", 'sse_algorithm     = "aws:kms"', "", "Missing required argument"),
        ("redis.tf", "num_cache_clusters         = 2", 'num_cache_clusters         = "two"', "a number is required"),
        ("registry.tf", '"IMMUTABLE"', '"FIXED"', "expected image_tag_mutability to be one of"),
    ],
    "alicloud": [
        ("node_pools.tf", "spot_strategy ", "spot_policy ", "Unsupported argument"),
        ("node_pools.tf", "management {", "manage {", "Unsupported block type"),
        ("iam.tf", 'policy_type = "Custom"', "", "Missing required argument"),
        ("node_pools.tf", "= local.disk_gib[each.key]", '= "large"', "a number is required"),
    ],
}


@pytest.fixture
def module(request: pytest.FixtureRequest) -> Module:
    """The module that a test is parametrised with."""
    found: Module = request.getfixturevalue(request.param)
    return found


def words(output: str) -> str:
    """Terraform's text without its frames and line breaks."""
    return re.sub(r"[\s│╷╵]+", " ", output)


@pytest.mark.parametrize("folder", [MODULES, HERE])
def test_files_are_formatted(folder: Path) -> None:
    need_terraform()
    done = subprocess.run(
        ["terraform", "fmt", "-check", "-recursive", str(folder)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("module", CLOUDS, indirect=True)
def test_it_is_valid(module: Module) -> None:
    done = module.run("validate")
    assert done.returncode == 0, done.stdout
    assert "deprecated" not in done.stdout.lower()


@pytest.mark.parametrize("module", CLOUDS, indirect=True)
def test_mistakes_are_found(module: Module, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    cloud = request.node.callspec.params["module"]
    wrong = module.copied(tmp_path / "module")
    for file, old, new, _ in MISTAKES[cloud]:
        wrong.edit(file, old, new)
    done = wrong.run("validate")
    assert done.returncode != 0
    complaints = re.split(r"Error: ", words(done.stdout))[1:]
    for file, _, _, complaint in MISTAKES[cloud]:
        assert any(complaint in text and f"on {file} line" in text for text in complaints), (complaint, done.stdout)
    assert len(complaints) == len(MISTAKES[cloud]), done.stdout


@pytest.mark.parametrize("own_tests", CLOUDS, indirect=True)
def test_its_own_tests_pass(own_tests: OwnTests, record_property: Any) -> None:
    [summary] = [each["test_summary"] for each in own_tests.messages if each["type"] == "test_summary"]
    troubles = [each["@message"] for each in own_tests.messages if each["@level"] == "error"]
    assert (own_tests.returncode, troubles) == (0, [])
    assert (summary["failed"], summary["errored"], summary["skipped"]) == (0, 0, 0)
    assert summary["passed"] > 10
    record_property("runs", summary["passed"])


@pytest.mark.parametrize("own_tests", ["alicloud"], indirect=True)
def test_the_chart_takes_the_values_alicloud_hands_out(own_tests: OwnTests) -> None:
    chart_values.check("alicloud", yaml.safe_load(own_tests.outputs("defaults")["helm_values"]))


@pytest.mark.parametrize("module", CLOUDS, indirect=True)
def test_its_own_tests_can_fail(module: Module, tmp_path: Path) -> None:
    wrong = module.copied(tmp_path / "module")
    wrong.edit("node_pools.tf", '"nvidia.com/gpu"', '"gpu"')
    (wrong.folder / "tests" / "refusals.tftest.hcl").unlink()
    done = wrong.run("test")
    assert done.returncode != 0
    assert "Nodes with GPUs, and no others, carry the taint" in words(done.stdout), done.stdout


@pytest.mark.parametrize("cloud", CLOUDS)
def test_every_variable_is_refused_once_or_cannot_be_wrong(cloud: str) -> None:
    variables = (MODULES / cloud / "variables.tf").read_text()
    refusals = (MODULES / cloud / "tests" / "refusals.tftest.hcl").read_text()
    blocks = re.split(r"^variable ", variables, flags=re.MULTILINE)[1:]
    checked = {block.split('"')[1] for block in blocks if "validation {" in block}
    assert len(checked) > 10
    assert set(re.findall(r"var\.(\w+)", refusals)) == checked


def test_both_clouds_are_cut_the_same() -> None:
    aws, alicloud = ({path.name for path in (MODULES / cloud).glob("*.tf")} for cloud in CLOUDS)
    assert aws == alicloud
