"""What can be said of the modules where Terraform is missing: they parse, and Alibaba Cloud's names are the provider's.

For AWS there is no schema to compare with; its names are checked by Terraform only (test_modules.py).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.infra.terraform.schema_check import complaints, resources
from tests.infra.terraform.terraform_runs import ALICLOUD_SCHEMA, MODULES, MORE_ALICLOUD_SCHEMA

CLOUDS = ("aws", "alicloud")


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    """Resource type -> schema."""
    if not ALICLOUD_SCHEMA.is_file():
        pytest.skip("../shared/terraform has no schema of the alicloud provider")
    given, ours = (json.loads(path.read_text()) for path in (ALICLOUD_SCHEMA, MORE_ALICLOUD_SCHEMA))
    assert given.keys().isdisjoint(ours)
    return given | ours


@pytest.mark.parametrize("cloud", CLOUDS)
def test_files_parse_and_hold_resources_of_their_cloud_only(cloud: str) -> None:
    found = [kind for path in (MODULES / cloud).glob("*.tf") for kind, _, _ in resources(path)]
    assert len(found) > 15
    assert [kind for kind in found if not kind.startswith(f"{cloud}_")] == []


def test_every_name_is_the_providers(schemas: dict[str, Any]) -> None:
    assert complaints(MODULES / "alicloud", schemas) == []


def test_the_schema_written_from_documentation_holds_what_is_used_and_no_more(schemas: dict[str, Any]) -> None:
    used = {kind for path in (MODULES / "alicloud").glob("*.tf") for kind, _, _ in resources(path)}
    assert json.loads(MORE_ALICLOUD_SCHEMA.read_text()).keys() <= used <= schemas.keys()


@pytest.mark.parametrize(
    ("file", "old", "new", "complaint"),
    [
        ("node_pools.tf", "spot_strategy ", "spot_policy ", "no argument spot_policy"),
        ("node_pools.tf", "management {", "manage {", "no block manage"),
        ("node_pools.tf", 'dynamic "taints"', 'dynamic "taint"', "no block taint"),
        ("node_pools.tf", "min_size ", "minimum ", "no argument minimum"),
        ("node_pools.tf", "node_pool_name ", "name ", "name is deprecated"),
        ("registry.tf", "instance_name  = var.name", "", "argument instance_name is missing"),
        ("network.tf", '"alicloud_vpc" "this"', '"alicloud_network" "this"', "no such resource type"),
        ("redis.tf", "password ", "connection_domain ", "connection_domain is the provider's to say"),
        ("iam.tf", "  policy_document =", "  document =", "no argument document"),
    ],
)
def test_a_wrong_name_is_found(
    file: str, old: str, new: str, complaint: str, schemas: dict[str, Any], tmp_path: Path
) -> None:
    text = (MODULES / "alicloud" / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    found = complaints(tmp_path, schemas)
    assert any(re.match(rf"{re.escape(file)}: .*: {re.escape(complaint)}$", each) for each in found), found
