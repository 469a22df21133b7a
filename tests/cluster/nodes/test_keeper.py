"""Turns of the keeper against the double of the API: the real Python client over HTTP, a clock that the tests set."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from cluster.nodes import RBAC, api
from cluster.nodes.backoff import FORBIDDEN_S
from cluster.nodes.keeper import READ_S, Keeper, Prewarm, Seen, Wish
from cluster.nodes.place import Place
from cluster.nodes.prewarm import ANNOTATION, Raised, Seat
from tests.cluster.nodes.objects import node, raycluster, rayservice, worker_group
from tests.kube_double import KubernetesDouble, Refusal, has_schemas, validate
from tests.serving import wait_for

L4 = {"ray.io/accelerator-type": "L4"}
CHILD = "demo-abcde"


@dataclass
class Bench:
    """A keeper and its clock."""

    keeper: Keeper
    now: list[float]

    def turn(self, wish: Wish | None = None, after_s: float = READ_S) -> Seen:
        self.now[0] += after_s
        return self.keeper.turn(wish or Wish())


@pytest.fixture
def bench(place: Place) -> Iterator[Bench]:
    yield from benches(place)


def benches(place: Place) -> Iterator[Bench]:
    now = [1000.0]
    made = Bench(Keeper(place, lambda: now[0]), now)
    yield made
    made.keeper.close()


def deploy(double: KubernetesDouble, active: str | None = CHILD, pending: str | None = None, least: int = 1) -> None:
    double.put(rayservice("demo", active, pending))
    for name in filter(None, (active, pending)):
        double.put(raycluster(name, worker_group("l4", least, 4, type_="L4"), worker_group("h100", 0, 2, type_="H100")))


def want(replicas: int, **more: Any) -> Wish:
    seats = (Seat("experts-0", replicas, 1, 1, L4),) if replicas else ()
    return Wish(prewarm=Prewarm(seats, **more))


def minima(double: KubernetesDouble, name: str = CHILD) -> dict[str, int]:
    groups = double.get("rayclusters", name)["spec"]["workerGroupSpecs"]
    return {group["groupName"]: group["minReplicas"] for group in groups}


def record(double: KubernetesDouble, name: str = CHILD) -> Any:
    annotations = double.get("rayclusters", name)["metadata"].get("annotations", {})
    return json.loads(annotations[ANNOTATION]) if ANNOTATION in annotations else None


def test_writes_are_validated_by_the_operators_schema() -> None:
    if not has_schemas():
        pytest.skip("the schemas of KubeRay's resources (../shared/kuberay) are not here: writes are not validated")
    for wrong in ({"minReplica": 1}, {"minReplicas": "1"}):
        with pytest.raises(Refusal):
            validate(raycluster(CHILD, worker_group("l4") | wrong))


def test_the_worker_groups_of_the_cluster_in_service_are_read(double: KubernetesDouble, bench: Bench) -> None:
    deploy(double)
    double.put(raycluster("other", worker_group("cpu", 0, 9, gpus=0)))
    seen = bench.turn()
    assert seen.troubles == ()
    assert seen.groups is not None
    assert [(group.name, group.minimum, group.maximum, group.gpus) for group in seen.groups] == [
        ("l4", 1, 4, 1.0),
        ("h100", 0, 2, 1.0),
    ]
    assert seen.groups_at == bench.now[0]


def test_nothing_is_asked_before_it_is_due(double: KubernetesDouble, bench: Bench) -> None:
    deploy(double)
    bench.turn()
    for _ in range(10):
        bench.turn(after_s=READ_S / 20)
    assert double.count("get", "rayclusters") == 1
    bench.turn()
    assert double.count("get", "rayclusters") == 2


def test_the_minimum_is_raised_on_the_child_and_let_go_to_what_was_found(
    double: KubernetesDouble, bench: Bench
) -> None:
    deploy(double)
    seen = bench.turn(want(3))
    assert minima(double) == {"l4": 3, "h100": 0}
    assert record(double) == {"l4": {"found": 1, "set": 3}}
    assert seen.raised == {"l4": Raised(1, 3)}
    service = double.get("rayservices", "demo")
    assert service["metadata"]["generation"] == 1, "a change there would not reach the running cluster"
    assert bench.turn(want(0)).raised == {}
    assert minima(double) == {"l4": 1, "h100": 0}
    assert record(double) is None
    changes = double.count("patch", "rayclusters")
    bench.turn(want(0))
    assert double.count("patch", "rayclusters") == changes == 2, "nothing to change is nothing to send"


def test_another_process_lets_go_what_one_that_died_has_raised(
    double: KubernetesDouble, bench: Bench, place: Place
) -> None:
    deploy(double)
    bench.turn(want(4))
    for successor in benches(place):
        unsure = replace(want(0).prewarm or Prewarm(), may_release=False)
        assert successor.turn(Wish(prewarm=unsure)).raised == {"l4": Raised(1, 4)}
        assert minima(double)["l4"] == 4, "what is wanted is not known yet"
        successor.turn(want(2))
        assert (minima(double)["l4"], record(double)) == (2, {"l4": {"found": 1, "set": 2}})
        successor.turn(want(0))
        assert minima(double)["l4"] == 1


def test_a_minimum_never_exceeds_the_maximum_and_that_is_told(double: KubernetesDouble, bench: Bench) -> None:
    deploy(double)
    seen = bench.turn(want(7))
    assert minima(double)["l4"] == 4
    assert "3 of 7 replicas of experts-0 find no room in any worker group" in seen.troubles[0]
    double.change("rayclusters", CHILD, {"spec": raycluster("x", worker_group("l4", 4, 6, type_="L4"))["spec"]})
    bench.turn(want(7))
    assert minima(double)["l4"] == 6


def test_what_somebody_writes_meanwhile_is_what_is_found(double: KubernetesDouble, bench: Bench) -> None:
    deploy(double)
    bench.turn(want(3))
    double.change("rayclusters", CHILD, {"spec": raycluster("x", worker_group("l4", 2, 4, type_="L4"))["spec"]})
    bench.turn(want(3))
    assert record(double) == {"l4": {"found": 2, "set": 3}}
    bench.turn(want(0))
    assert minima(double)["l4"] == 2
    bench.turn(want(3))
    double.change("rayclusters", CHILD, {"spec": raycluster("x", worker_group("l4", 0, 4, type_="L4"))["spec"]})
    bench.turn(want(0))
    assert minima(double)["l4"] == 0, "a person's value is nobody's to restore"


def test_a_worker_group_that_was_appended_moves_nothing(double: KubernetesDouble, bench: Bench) -> None:
    deploy(double)
    bench.turn(want(3))
    groups = double.get("rayclusters", CHILD)["spec"]["workerGroupSpecs"]
    double.change("rayclusters", CHILD, {"spec": {"workerGroupSpecs": [*groups, worker_group("t4", 1, 3)]}})
    bench.turn(want(0))
    assert minima(double) == {"l4": 1, "h100": 0, "t4": 1}


def test_what_rays_autoscaler_writes_in_between_survives(double: KubernetesDouble, bench: Bench) -> None:
    deploy(double)

    def scales(_key: object) -> None:
        groups = double.get("rayclusters", CHILD)["spec"]["workerGroupSpecs"]
        groups[0]["replicas"] = 2
        double.change("rayclusters", CHILD, {"spec": {"workerGroupSpecs": groups}})

    double.interfere += [scales, scales]
    seen = bench.turn(want(3))
    assert seen.troubles == ()
    codes = [each.code for each in double.requests if each.verb == "patch"]
    assert codes == [409, 409, 200], "each time read again, with its version"
    group = double.get("rayclusters", CHILD)["spec"]["workerGroupSpecs"][0]
    assert (group["minReplicas"], group["replicas"]) == (3, 2)


def test_endless_conflicts_end_a_turn_and_are_told(double: KubernetesDouble, bench: Bench) -> None:
    deploy(double)
    touches = iter(range(100))
    double.interfere += [
        lambda _key: double.change("rayclusters", CHILD, {"metadata": {"labels": {"n": str(next(touches))}}})
    ] * 5
    (trouble,) = bench.turn(want(3)).troubles
    assert "(409)" in trouble
    assert minima(double)["l4"] == 1
    assert bench.turn(want(3)).troubles == ()
    assert minima(double)["l4"] == 3


def test_a_role_without_a_verb_is_told_once_with_that_verb_and_not_hammered(
    double: KubernetesDouble, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    deploy(double)
    double.allowed = [rule | {"verbs": ["get"]} for rule in double.allowed or []]
    with caplog.at_level(logging.WARNING, "cluster"):
        for _ in range(10):
            seen = bench.turn(want(3))
    (trouble,) = seen.troubles
    assert "may not patch rayclusters 'demo-abcde' in namespace 'prod' (403)" in trouble
    assert "its Role needs the verb 'patch' on 'rayclusters'" in trouble
    assert double.count("patch", "rayclusters") == 1
    assert sum("403" in line.message for line in caplog.records) == 1
    assert double.count("get", "rayclusters") == 10, "what may be read is read on"
    double.allowed = None
    assert bench.turn(want(3), after_s=FORBIDDEN_S).troubles == ()
    assert minima(double)["l4"] == 3


@pytest.mark.parametrize(("resource", "count"), [("rayservices", 1), ("rayclusters", 1)])
def test_reading_that_is_forbidden_leaves_what_was_known(
    double: KubernetesDouble, bench: Bench, resource: str, count: int
) -> None:
    deploy(double)
    known = bench.turn()
    double.allowed = [rule for rule in double.allowed or [] if resource not in rule["resources"]]
    before = double.count("get", resource)
    for _ in range(5):
        seen = bench.turn()
    assert f"needs the verb 'get' on '{resource}'" in seen.troubles[0]
    assert double.count("get", resource) - before == count
    assert (seen.groups, seen.groups_at) == (known.groups, known.groups_at), "with the age it has"


def test_each_rule_is_needed(double: KubernetesDouble, place: Place) -> None:
    deploy(double)
    double.put(node("n1"), None)
    full = list(double.allowed or [])
    for rule in RBAC:
        for verb in rule.verbs:
            double.allowed = [
                each | {"verbs": [one for one in each["verbs"] if (rule.resource, one) != (each["resources"][0], verb)]}
                for each in full
            ]
            for bench in benches(place):
                wish = replace(want(3), nodes=True)

                def refused(bench: Bench = bench, wish: Wish = wish, verb: str = verb) -> bool:
                    return any(f"verb {verb!r}" in each for each in bench.turn(wish, after_s=1).troubles)

                wait_for(refused, 10, f"a sentence on {verb} {rule.resource}")


def test_while_the_server_is_away_it_is_asked_less_and_less_and_nothing_is_forgotten(
    double: KubernetesDouble, bench: Bench
) -> None:
    deploy(double)
    known = bench.turn(want(3))
    with double.outage():
        asked = 0
        started = bench.now[0]
        while bench.now[0] < started + 300:
            before = bench.keeper._due_at
            seen = bench.turn(want(3), after_s=1)
            asked += bench.keeper._due_at != before
        assert "the API server does not answer" in seen.troubles[0]
        assert seen.groups == known.groups
        assert seen.raised == known.raised
        assert 6 <= asked <= 12
    assert bench.turn(want(3), after_s=60).troubles == ()


def test_a_server_that_was_never_there_is_only_a_sentence(double: KubernetesDouble, bench: Bench) -> None:
    with double.outage():
        seen = bench.turn(replace(want(3), nodes=True))
    assert seen.groups is None
    assert len(seen.troubles) == 1


def test_during_an_upgrade_each_process_looks_after_its_own_cluster(double: KubernetesDouble, place: Place) -> None:
    deploy(double, "old", "new")
    for bench in benches(replace(place, own_cluster="new", rayservice=None)):
        assert bench.turn(want(3)).troubles == ()
        assert (minima(double, "old")["l4"], minima(double, "new")["l4"]) == (1, 3)
        double.put(rayservice("demo", "new"))
        double.delete("rayclusters", "old")
        bench.turn(want(0))
        assert minima(double, "new")["l4"] == 1
        double.put(rayservice("demo", "newer"))
        (trouble,) = bench.turn(want(3)).troubles
        assert "names 'new' neither active nor pending" in trouble
        assert minima(double, "new")["l4"] == 1


def test_from_outside_both_are_warmed_and_the_active_one_is_read(double: KubernetesDouble, bench: Bench) -> None:
    deploy(double, "old")
    double.put(rayservice("demo", "old", "new"))
    assert bench.turn(want(3)).troubles == (), "a pending one that is not there yet is no trouble"
    double.put(raycluster("new", worker_group("l4", 0, 2, type_="L4")))
    seen = bench.turn(want(3))
    assert (minima(double, "old")["l4"], minima(double, "new")["l4"]) == (3, 2)
    assert seen.raised == {"l4": Raised(1, 3)}
    assert seen.groups is not None
    assert seen.groups[0].maximum == 4


def test_a_raycluster_that_no_rayservice_made_is_its_own(double: KubernetesDouble, place: Place) -> None:
    double.put(raycluster("alone", worker_group("l4", 1, 4, type_="L4"), owner=None))
    double.allowed = [rule for rule in double.allowed or [] if rule["resources"] != ["rayservices"]]
    for bench in benches(replace(place, own_cluster="alone", rayservice=None)):
        assert bench.turn(want(2)).troubles == ()
        assert minima(double, "alone")["l4"] == 2


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (
            lambda double: double.delete("rayservices", "demo"),
            "there is no rayservices 'demo' in namespace 'prod' (404)",
        ),
        (lambda double: double.put(rayservice("demo", None)), "has no active RayCluster yet"),
        (lambda double: double.put(rayservice("demo", "gone")), "there is no rayclusters 'gone'"),
    ],
)
def test_what_is_not_there_is_told(
    double: KubernetesDouble, bench: Bench, break_it: Callable[[KubernetesDouble], Any], sentence: str
) -> None:
    deploy(double)
    bench.turn()
    break_it(double)
    seen = bench.turn()
    assert sentence in seen.troubles[0]
    assert seen.groups is not None


def test_a_record_that_makes_no_sense_is_begun_anew(double: KubernetesDouble, bench: Bench) -> None:
    deploy(double)
    double.change("rayclusters", CHILD, {"metadata": {"annotations": {ANNOTATION: "[1, 2"}}})
    seen = bench.turn(want(2))
    assert "is not as it was written" in seen.troubles[0]
    assert record(double) == {"l4": {"found": 1, "set": 2}}


def test_only_named_worker_groups_are_raised(double: KubernetesDouble, bench: Bench) -> None:
    deploy(double)
    bench.turn(want(3, patterns=("h*",)))
    assert minima(double)["l4"] == 1


def test_a_wish_that_changes_is_acted_upon_before_the_next_reading(double: KubernetesDouble, bench: Bench) -> None:
    deploy(double)
    bench.turn(want(0))
    bench.turn(want(3), after_s=3)
    assert minima(double)["l4"] == 3


def test_a_kubeconfig_that_is_not_there_is_a_sentence(tmp_path: Any) -> None:
    for bench in benches(Place("prod", str(tmp_path / "nothing"), "demo")):
        (trouble,) = bench.turn().troubles
        assert "nothing' cannot be used" in trouble


def test_answers_that_make_no_sense_are_sentences(
    double: KubernetesDouble, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy(double)
    monkeypatch.setattr(api.Api, "raycluster", lambda *_: {"spec": {"workerGroupSpecs": [{"labels": 3}]}})
    (trouble,) = bench.turn(want(3)).troubles
    assert "makes no sense" in trouble
