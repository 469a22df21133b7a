"""RAY_DASHBOARD.md: links that lead somewhere, pictures that are light, and the names that Ray 2.60 reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ray._private import ray_constants
from ray.dashboard.modules.metrics import metrics_head

INFRA = Path(__file__).resolve().parent.parent.parent / "infra"
TEXT = (INFRA / "RAY_DASHBOARD.md").read_text()
LARGEST_BYTES = 150_000


def test_every_link_and_picture_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert len(links) > 4
    assert [link for link in links if not (INFRA / link).is_file()] == []


@pytest.mark.parametrize("name", re.findall(r"\(([\w-]+\.png)\)", TEXT))
def test_pictures_are_light(name: str) -> None:
    assert (INFRA / name).stat().st_size < LARGEST_BYTES


def test_the_variables_and_their_defaults_are_rays() -> None:
    rows = dict(re.findall(r"^\| `(RAY_\w+)` \|.*\| `?([^|`]+)`? \|$", TEXT, re.MULTILINE))
    known = {value for name, value in vars(metrics_head).items() if name.endswith("_ENV_VAR")}
    assert len(rows) == 6
    assert rows.keys() <= known
    assert rows["RAY_PROMETHEUS_HOST"] == metrics_head.DEFAULT_PROMETHEUS_HOST
    assert rows["RAY_GRAFANA_HOST"] == metrics_head.DEFAULT_GRAFANA_HOST
    assert rows["RAY_PROMETHEUS_NAME"] == metrics_head.DEFAULT_PROMETHEUS_NAME
    assert rows["RAY_GRAFANA_ORG_ID"] == metrics_head.DEFAULT_GRAFANA_ORG_ID
    assert f"`{metrics_head.GRAFANA_HOST_DISABLED_VALUE}` hides" in TEXT
    assert f"`{ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE}`" in TEXT
