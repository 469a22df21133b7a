"""Which replicas run on which machines, and what that gives each pool. Pure; milliseconds."""

from __future__ import annotations

import pytest

from cluster.nodes.offers import Offer, capacity, matches

L4, H100 = ({"ray.io/accelerator-type": kind} for kind in ("L4", "H100"))


@pytest.mark.parametrize(
    ("wanted", "labels", "expected"),
    [
        ({}, {}, True),
        ({}, {"a": "1"}, True),
        ({"a": "1"}, {"a": "1"}, True),
        ({"a": "1"}, {"a": "2"}, False),
        ({"a": "1"}, {}, False),
        ({"a": "!1"}, {"a": "2"}, True),
        ({"a": "!1"}, {}, True),
        ({"a": "!1"}, {"a": "1"}, False),
        ({"a": "in(1, 2)"}, {"a": "2"}, True),
        ({"a": "in(1,2)"}, {"a": "3"}, False),
        ({"a": "in(1,2)"}, {}, False),
        ({"a": "!in(1,2)"}, {"a": "2"}, False),
        ({"a": "!in(1,2)"}, {"a": "3"}, True),
        ({"a": "1", "b": "2"}, {"a": "1"}, False),
    ],
)
def test_label_selectors_mean_what_ray_says(wanted: dict[str, str], labels: dict[str, str], expected: bool) -> None:
    assert matches(wanted, labels) is expected


def test_each_pool_gets_what_its_replicas_can_run_on() -> None:
    offers = [Offer("l4", 4, 1, 8, L4), Offer("h100", 2, 8, 64, H100), Offer("cpu", 9, 0, 4)]
    found = capacity(offers, "gpus", {"default": [L4], "h100": [H100], "any": [{}]})
    assert found.total == 20
    assert found.pools == {"default": 4, "h100": 16, "any": 20}
    assert found.unmatched == ()
    assert capacity(offers, "cpus", {}).total == 4 * 8 + 2 * 64 + 9 * 4


def test_a_pool_with_two_kinds_of_replicas_gets_both_kinds_of_machines_once() -> None:
    offers = [Offer("l4", 4, 1, 8, L4), Offer("h100", 2, 8, 64, H100)]
    assert capacity(offers, "gpus", {"default": [L4, H100, L4]}).pools == {"default": 20}


def test_a_pool_that_no_machine_suits_is_named_and_not_zero() -> None:
    found = capacity([Offer("l4", 4, 1, 8, L4)], "gpus", {"h100": [H100]})
    assert found.unmatched == ("h100",)
    assert "h100" not in found.pools


def test_machines_without_the_resource_suit_nobody_who_needs_it() -> None:
    assert capacity([Offer("cpu", 4, 0, 8)], "gpus", {"default": [{}]}).unmatched == ("default",)


@pytest.mark.parametrize(
    ("gpus", "cpus", "fit"),
    [(1, 0, 8), (0.5, 1, 16), (0.3, 0, 26), (0.1, 0, 80), (3, 0, 2), (9, 0, 0), (1, 32, 2), (0, 0, 0), (0, 7, 9)],
)
def test_whole_replicas_fit_a_machine(gpus: float, cpus: float, fit: int) -> None:
    assert Offer("h100", 1, 8, 64).fit(gpus, cpus) == fit
