"""The thread that asks the cluster, and what the policy makes of its answers: against Ray's node list and the double of
the Kubernetes API. The thread is the real one; no Ray cluster.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autoscale import cluster_link, cluster_side
from autoscale.capacity_spec import KubernetesSpec
from autoscale.cluster_budget import Given
from autoscale.cluster_link import ClusterLink, Wanted, ray_offers
from autoscale.cluster_side import ClusterSide
from autoscale.signals import Fleet, Signals, UnitFacts
from autoscale.spec import PolicySpec
from cluster.nodes import cluster_role, role
from cluster.nodes.keeper import Prewarm
from cluster.nodes.offers import Offer
from tests.autoscale.fleets import at
from tests.cluster.nodes.objects import kubeconfig, node, raycluster, rayservice, worker_group
from tests.kube_double import KubernetesDouble, serve_double
from tests.serving import wait_for

L4 = {"ray.io/accelerator-type": "L4"}
ROWS = [
    {"Alive": True, "NodeID": "1", "NodeName": "a", "Resources": {"GPU": 4.0, "CPU": 8.0, "accelerator_type:L4": 1.0}},
    {"Alive": True, "NodeID": "2", "Resources": {"CPU": 2.0}, "Labels": {"kind": "cpu"}},
    {"Alive": False, "NodeID": "3", "NodeName": "gone", "Resources": {"GPU": 4.0}},
]
FLEET = Fleet({"experts-0": UnitFacts("experts-0", "experts-0", gpus=1, cpus=1, selector=L4)}, 8)
SIGNALS = Signals({"experts-0": at(1)}, {}, None)
ALWAYS = [{"cron": "* * * * *", "duration_s": 600, "groups": {"experts-0": {"min_replicas": 3}}}]


@pytest.fixture
def double() -> Iterator[KubernetesDouble]:
    made, server = serve_double()
    made.allowed = role("demo") + cluster_role()
    made.put(rayservice("demo", "demo-abcde"))
    made.put(raycluster("demo-abcde", worker_group("l4", 1, 4, type_="L4", node_selector={"kind": "l4"})))
    made.put(node("n", 2, kind="l4"))
    yield made
    made.go_away()
    server.shutdown()
    server.server_close()


def policy(double: KubernetesDouble, folder: Path, **parts: Any) -> PolicySpec:
    reached = {"kubeconfig": str(kubeconfig(folder, double.url)), "namespace": "prod", "rayservice": "demo"}
    return PolicySpec.model_validate({"version": 1, "kubernetes": reached, **parts})


def least(double: KubernetesDouble) -> int:
    return int(double.get("rayclusters", "demo-abcde")["spec"]["workerGroupSpecs"][0]["minReplicas"])


def test_rays_own_nodes_are_offers_with_the_labels_selectors_ask_for() -> None:
    assert ray_offers(ROWS) == (Offer("a", 1, 4, 8, L4), Offer("2", 1, 0, 2, {"kind": "cpu"}))


def test_outside_kubernetes_rays_nodes_are_the_cluster_and_nothing_is_prewarmed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster_link, "ray", SimpleNamespace(nodes=lambda: ROWS))
    link = ClusterLink(KubernetesSpec(), environment={})
    link.want(Wanted(budget=True, prewarm=Prewarm()))
    given = wait_for(lambda: link.latest if link.latest and link.latest.offers else None, 10, "the nodes")
    assert given.source == "ray"
    assert [each["name"] for each in given.shown["nodes"]] == ["a", "2"]
    assert given.troubles == ("prewarm: off, this is not Kubernetes, and the policy names no `kubernetes.kubeconfig`",)


def test_a_ray_that_does_not_answer_leaves_the_nodes_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([ROWS])

    def nodes() -> Any:
        try:
            return next(answers)
        except StopIteration:
            raise ConnectionError("no GCS") from None

    monkeypatch.setattr(cluster_link, "ray", SimpleNamespace(nodes=nodes))
    monkeypatch.setattr(cluster_link, "RAY_PERIOD_S", 0.0)
    link = ClusterLink(KubernetesSpec(), environment={})
    link.want(Wanted(budget=True))
    wait_for(lambda: link.latest and link.latest.troubles, 10, "a sentence")
    assert link.latest is not None
    assert "no GCS" in link.latest.troubles[0]
    assert link.latest.offers == ray_offers(ROWS)


def test_a_mistake_of_ours_is_told_and_the_thread_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([ZeroDivisionError("oh")])

    def turn(_wanted: Wanted, _last: Given | None) -> Given:
        if (error := next(answers, None)) is not None:
            raise error
        return Given("ray", ())

    monkeypatch.setattr(cluster_link, "_ray_turn", lambda _place: turn)
    monkeypatch.setattr(cluster_link, "MISTAKE_S", 0.5)
    link = ClusterLink(KubernetesSpec(), environment={})
    told = wait_for(lambda: link.latest, 5, "the first turn")
    assert "oh" in told.troubles[0]
    wait_for(lambda: link.latest == Given("ray", ()), 5, "the second turn")


def test_the_thread_ends_with_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_link, "ray", SimpleNamespace(nodes=lambda: ROWS))
    before = set(threading.enumerate())
    link = ClusterLink(KubernetesSpec(), environment={})
    (thread,) = (each for each in set(threading.enumerate()) - before if each.name == "cluster-link")
    gone = weakref.ref(link)
    del link

    def ended() -> bool:
        gc.collect()
        return gone() is None and not thread.is_alive()

    wait_for(ended, 10, "the end of the thread")


def test_a_policy_of_numbers_makes_no_link_at_all() -> None:
    side, spec = ClusterSide(), PolicySpec(version=1)
    side.follow(spec)
    assert side.budgeted(spec, FLEET, 0.0) is spec
    assert side.report() is None
    assert side._link is None


@pytest.mark.parametrize(("word", "gpus"), [("cluster", 4.0), ("nodes", 1.0)])
def test_the_budget_is_what_kubernetes_gives(double: KubernetesDouble, tmp_path: Path, word: str, gpus: float) -> None:
    # One node with two GPUs, but CPUs for one pod of eight only.
    side, spec = ClusterSide(), policy(double, tmp_path, budget={"gpus": word})
    side.follow(spec)

    def numbers() -> PolicySpec | None:
        side.follow(spec)
        return side.budgeted(spec, FLEET, time.monotonic())

    found = wait_for(numbers, 15, "a budget")
    assert found.budget.limits == {("gpus", None): gpus, ("gpus", "default"): gpus}
    assert numbers() is found, "the same object until something changes"
    shown = side.report()
    assert shown is not None
    assert shown["source"] == "kubernetes"
    assert shown["worker_groups"][0]["max_replicas"] == 4
    assert ("node_pools" in shown) == (word == "nodes")
    assert shown["troubles"] == []
    assert double.count("list", "nodes") == (1 if word == "nodes" else 0), "nodes are only asked for where they count"


def test_a_peak_is_prewarmed_and_let_go_when_the_policy_ends_it(double: KubernetesDouble, tmp_path: Path) -> None:
    side = ClusterSide()
    peak = policy(double, tmp_path, schedule=ALWAYS, prewarm={"lead_s": 60})

    def tick(spec: PolicySpec) -> None:
        side.follow(spec)
        side.budgeted(spec, FLEET, time.monotonic())
        side.prewarm(spec, FLEET, SIGNALS, {}, time.monotonic(), datetime.now(UTC))

    def raised() -> bool:
        tick(peak)
        return least(double) == 3

    wait_for(raised, 15, "the raised minimum")
    wait_for(lambda: (side.report() or {}).get("prewarmed"), 5, "the report")
    assert (side.report() or {})["prewarmed"] == {"l4": {"from": 1, "to": 3}}
    only_budget = policy(double, tmp_path, budget={"gpus": "cluster"})

    def let_go() -> bool:
        tick(only_budget)
        return least(double) == 1

    wait_for(let_go, 15, "the minimum that was found")
    wait_for(raised, 15, "the raised minimum, again")
    off = policy(double, tmp_path)

    def dropped() -> bool:
        tick(off)
        return side._link is None

    wait_for(dropped, 30, "the end of the link")
    assert least(double) == 1


def test_a_tick_never_waits_for_a_server_that_does_not_answer(double: KubernetesDouble, tmp_path: Path) -> None:
    side = ClusterSide()
    spec = policy(double, tmp_path, budget={"gpus": "cluster"}, schedule=ALWAYS, prewarm={"lead_s": 60})
    with double._changed:  # whoever asks now waits
        started = time.monotonic()
        for _ in range(100):
            side.follow(spec)
            assert side.budgeted(spec, FLEET, time.monotonic()) is None
            side.prewarm(spec, FLEET, SIGNALS, {}, time.monotonic(), datetime.now(UTC))
            side.report()
        assert time.monotonic() - started < 1.0
    assert "no decision" in side.notes[0]


def a_raised_cluster(double: KubernetesDouble, folder: Path) -> tuple[ClusterSide, Callable[[PolicySpec], None]]:
    """(a policy's side of it, with machines raised by it, and its tick)"""
    side = ClusterSide()
    peak = policy(double, folder, schedule=ALWAYS, prewarm={"lead_s": 60})

    def tick(spec: PolicySpec) -> None:
        side.follow(spec)
        side.budgeted(spec, FLEET, time.monotonic())
        side.prewarm(spec, FLEET, SIGNALS, {}, time.monotonic(), datetime.now(UTC))

    def raised() -> bool:
        tick(peak)
        return least(double) == 3

    wait_for(raised, 15, "the raised minimum")
    return side, tick


def test_what_is_raised_is_let_go_where_the_place_leaves_the_policy_with_it(
    double: KubernetesDouble, tmp_path: Path
) -> None:
    side, tick = a_raised_cluster(double, tmp_path)

    def dropped() -> bool:
        tick(PolicySpec(version=1))
        return side._link is None

    wait_for(dropped, 30, "the end of the link")
    assert least(double) == 1


def test_what_is_raised_is_let_go_where_the_policy_moves_to_another_place(
    double: KubernetesDouble, tmp_path: Path
) -> None:
    side, tick = a_raised_cluster(double, tmp_path)
    reached = {"kubeconfig": str(tmp_path / "kubeconfig"), "namespace": "prod", "rayservice": "another"}
    moved = PolicySpec.model_validate({"version": 1, "kubernetes": reached, "prewarm": {"lead_s": 60}})

    def let_go() -> bool:
        tick(moved)
        return not side._leaving

    wait_for(let_go, 30, "the end of the link before")
    assert least(double) == 1
    assert side._link is not None


def test_a_place_where_nobody_answered_is_left_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mistaken = Given("kubernetes", None, shown={"worker_groups": []}, troubles=("there is no rayservices 'demoo'",))
    fake = SimpleNamespace(latest=mistaken, want=lambda _wanted: None)
    monkeypatch.setattr(cluster_side, "ClusterLink", lambda _spec: fake)
    side = ClusterSide()
    for name in ("demoo", "demo", "demo"):
        side.follow(
            PolicySpec.model_validate({"version": 1, "prewarm": {"lead_s": 1}, "kubernetes": {"rayservice": name}})
        )
    assert side._leaving == []


def test_another_place_in_the_policy_is_another_link(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    fake = SimpleNamespace(latest=None, want=lambda _wanted: None)
    monkeypatch.setattr(cluster_side, "ClusterLink", lambda spec: made.append(spec) or fake)
    side = ClusterSide()
    for name in ("one", "one", "two"):
        side.follow(
            PolicySpec.model_validate({"version": 1, "budget": {"gpus": "cluster"}, "kubernetes": {"rayservice": name}})
        )
    assert [spec.rayservice for spec in made] == ["one", "two"]
