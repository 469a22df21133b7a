"""Machines for replicas, and what is raised and let go over any history. Pure; a few seconds."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.nodes.inventory import worker_groups
from cluster.nodes.prewarm import ANNOTATION, Seat, machines, plan
from tests.cluster.nodes.objects import raycluster, worker_group
from tests.kube_double import json_patched

L4, H100 = ({"ray.io/accelerator-type": kind} for kind in ("L4", "H100"))


def groups(*listed: dict[str, Any]) -> Any:
    return worker_groups(raycluster("c", *listed))


def test_fractions_share_machines_and_whole_ones_do_not() -> None:
    listed = groups(worker_group("h100", 0, 9, gpus=2, type_="H100"))
    assert machines([Seat("a", 3, 0.5, 1, H100)], listed)[0] == {"h100": 1}
    assert machines([Seat("a", 5, 0.5, 1, H100)], listed)[0] == {"h100": 2}
    assert machines([Seat("a", 3, 1.5, 1, H100)], listed)[0] == {"h100": 3}
    assert machines([Seat("a", 3, 0, 4, H100)], listed)[0] == {"h100": 2}


def test_the_cheapest_machines_first_and_the_next_where_they_end() -> None:
    dear, cheap = worker_group("dear", 0, 9, price="4"), worker_group("cheap", 0, 2, price="1")
    listed = groups(worker_group("unpriced", 0, 9), dear, cheap)
    assert machines([Seat("a", 2, 1, 1)], listed)[0] == {"cheap": 2}
    assert machines([Seat("a", 5, 1, 1)], listed)[0] == {"cheap": 2, "dear": 3}


def test_what_is_there_already_is_counted_but_raises_nothing_by_itself() -> None:
    listed = groups(worker_group("l4", 0, 9, type_="L4"), worker_group("h100", 0, 9, type_="H100"))
    seats = [Seat("usual", 2, 1, 1, L4, peak=False), Seat("other", 1, 1, 1, H100, peak=False), Seat("hot", 3, 1, 1, L4)]
    assert machines(seats, listed)[0] == {"l4": 5}
    assert machines(seats[:2], listed)[0] == {}


def test_replicas_without_any_machine_are_a_sentence() -> None:
    wanted, notes = machines([Seat("a", 2, 1, 1, H100)], groups(worker_group("l4", 0, 9, type_="L4")))
    assert wanted == {}
    assert notes == ("prewarm: 2 of 2 replicas of a find no room in any worker group",)


def test_a_head_and_a_group_that_is_suspended_are_never_raised() -> None:
    cluster = raycluster("c", worker_group("a", 0, 9, suspend=True))
    cluster["spec"]["headGroupSpec"]["rayStartParams"] = {"num-cpus": "4", "num-gpus": "2"}
    assert machines([Seat("a", 1, 1, 1)], worker_groups(cluster))[0] == {}


def test_nothing_wanted_and_nothing_raised_is_nothing_to_do() -> None:
    made = plan(raycluster("c", worker_group("a", 2)), {"a": 1}, True)
    assert (made.patch, made.raised) == ((), {})


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("want"), st.integers(0, 9)),
        st.tuples(st.just("unsure"), st.integers(0, 9)),
        st.tuples(st.just("person"), st.integers(0, 5)),
    ),
    max_size=12,
)


@settings(deadline=None)
@given(st.integers(0, 5), STEPS)
def test_over_any_history_bounds_hold_and_a_person_s_value_returns(found: int, steps: list[tuple[str, int]]) -> None:
    """Whoever plans remembers nothing: every step reads the object anew, as after a restart."""
    cluster = raycluster("c", worker_group("a", found, 5))
    cluster["metadata"]["resourceVersion"] = "1"

    def least() -> int:
        return int(cluster["spec"]["workerGroupSpecs"][0]["minReplicas"])

    for kind, number in [*steps, ("want", 0)]:
        before = least()
        if kind == "person":
            # Writing the very value that was set cannot be told from leaving it alone.
            if number != before and f'"set": {number}' not in str(cluster["metadata"].get("annotations")):
                found = number
                cluster["spec"]["workerGroupSpecs"][0]["minReplicas"] = number
            continue
        cluster = json_patched(cluster, plan(cluster, {"a": number} if number else {}, kind == "want").patch)
        assert found <= least() <= 5
        assert least() >= min(5, number)
        if kind == "want":
            assert least() == max(found, min(5, number))
            assert plan(cluster, {"a": number} if number else {}, True).patch == ()
        else:
            assert least() >= before
    assert least() == found
    assert ANNOTATION not in cluster["metadata"].get("annotations", {})
