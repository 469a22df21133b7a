"""An upgrade from one set of values to another: what KubeRay does in the running cluster, what makes a new one."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helm.charts import CHART, Document, ci, merged, ray_service, render, texts
from tests.helm.upgrades import appends, new_cluster_because, not_carried_over

START = ci("mixed-gpu")
L40S: Document = {
    "name": "l40s",
    "minReplicas": 0,
    "maxReplicas": 4,
    "labels": {"expertscale.io/pool": "l40s"},
    "resources": {"limits": {"cpu": "8", "memory": "48Gi", "nvidia.com/gpu": "1"}},
    "nodeSelector": {"expertscale.io/pool": "l40s"},
}


def changed(change: Callable[[Document], object]) -> tuple[Document, Document]:
    """The RayServices before and after `change` of the mixed values."""
    values = copy.deepcopy(START)
    change(values)
    return ray_service(START), ray_service(values)


def groups(values: Document) -> list[Document]:
    return values["workerGroups"]["experts"]


IN_PLACE: dict[str, Callable[[Document], object]] = {
    "nothing": lambda _: None,
    "a group appended": lambda values: groups(values).append(L40S),
    "two groups appended": lambda values: groups(values).extend([L40S, {**L40S, "name": "l40s-spot"}]),
    "counts": lambda values: groups(values)[0].update(minReplicas=5, maxReplicas=20),
    "the policy": lambda values: values["policy"]["spec"]["defaults"].update(max_replicas=3),
    "arguments of the application": lambda values: values["serve"]["router"].update(max_sequences=64),
    "a pool beside an appended group": lambda values: (
        groups(values).append(L40S),
        values["serve"]["experts"]["pools"].update(
            l40s={"resources": {"num_gpus": 1, "label_selector": {"expertscale.io/pool": "l40s"}}}
        ),
    ),
    "who may reach the API": lambda values: values.update(networkPolicy={"http": {"from": [{"podSelector": {}}]}}),
    "alerts": lambda values: values["prometheusRule"].update(labels={"release": "other"}),
}
NEW_CLUSTER: dict[str, tuple[Callable[[Document], object], str]] = {
    "a group in front": (lambda values: groups(values).insert(0, L40S), "worker group 1 was l4 and is l40s"),
    "groups in another order": (lambda values: groups(values).reverse(), "worker group 1 was l4 and is h100"),
    "a group taken away": (
        lambda values: (groups(values).pop(), values["serve"]["experts"].pop("pools")),
        "worker group h100 is gone",
    ),
    "a group renamed": (
        lambda values: groups(values)[1].update(name="hopper"),
        "worker group 2 was h100 and is hopper",
    ),
    "another image": (lambda values: values.update(image={"tag": "2"}), "headGroupSpec"),
    "a group's idle time": (lambda values: groups(values)[0].update(idleTimeoutSeconds=5), "l4.idleTimeoutSeconds"),
    "a group's labels": (lambda values: groups(values)[1]["labels"].update(a="b"), "h100.labels"),
    "traces": (lambda values: values.update(otel={"endpoint": ""}), "a10g.template"),
}


@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
def test_these_changes_are_made_in_the_running_cluster(change: Callable[[Document], object]) -> None:
    assert new_cluster_because(*changed(change)) == []


@pytest.mark.parametrize(("change", "reason"), NEW_CLUSTER.values(), ids=NEW_CLUSTER)
def test_these_changes_make_a_new_cluster(change: Callable[[Document], object], reason: str) -> None:
    assert reason in new_cluster_because(*changed(change))


def test_counts_are_not_carried_over_to_the_running_cluster() -> None:
    before, after = changed(lambda values: groups(values)[0].update(minReplicas=5, maxReplicas=20))
    assert sorted(not_carried_over(before, after)) == ["l4.maxReplicas", "l4.minReplicas", "l4.replicas"]
    assert new_cluster_because(before, after) == []


def test_a_group_appended_puts_all_counts_back_to_the_values() -> None:
    """What was patched in the running cluster, by hand or by pre-warming, goes with it; the README says so."""
    before, after = changed(lambda values: (groups(values)[0].update(maxReplicas=20), groups(values).append(L40S)))
    assert new_cluster_because(before, after) == []
    assert appends(before, after)
    assert not_carried_over(before, after) == []
    [row] = [
        line for line in (CHART / "README.md").read_text().splitlines() if line.startswith("| worker groups appended")
    ]
    assert "go back to the values" in row
    assert "pre-warming" in row


def test_an_edit_of_the_policy_changes_the_config_map_and_nothing_else() -> None:
    other = merged(START, {"policy": {"spec": {"defaults": {"max_replicas": 3}}}})
    before, after = render(START), render(other)
    differing = [old["metadata"]["name"] for old, new in zip(before, after, strict=True) if old != new]
    assert differing == ["mixed-policy"]


def test_a_new_version_of_the_chart_leaves_the_pods_as_they_are(tmp_path: Path) -> None:
    """Version labels and checksums in a pod template would build a new cluster for every release of the chart."""
    newer = tmp_path / "expertscale"
    shutil.copytree(CHART, newer)
    (newer / "Chart.yaml").write_text(
        (CHART / "Chart.yaml").read_text().replace("version: 0.1.0\napp", "version: 0.9.0\napp")
    )
    before, after = ray_service(START), ray_service(START, chart=newer)
    assert before["metadata"]["labels"]["helm.sh/chart"] != after["metadata"]["labels"]["helm.sh/chart"]
    assert new_cluster_because(before, after) == []


def test_rendering_twice_gives_the_same() -> None:
    """No random passwords and no times: tools that compare renderings would see changes for ever."""
    assert texts(START) == texts(START)
