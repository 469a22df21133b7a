from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from autoscale.needs import Need
from autoscale.pools import Scalable, Unit, scalables
from autoscale.signals import ROUTER, Fleet, GroupLoad, Signals, UnitCounts, UnitFacts
from autoscale.spec import PolicySpec
from tests.autoscale.fleets import at, group_fleet

POOLS = ("h100", "default", "t4")
GROUP = "experts-0"


def group(
    counts: Mapping[str, UnitCounts], load: GroupLoad | None = None, *, speed: float | None = None, **spec: Any
) -> Scalable:
    fleet = group_fleet(1, POOLS, speed=speed)
    full = {name: counts.get(name, at(0)) for name in fleet.units}
    return scalables(Signals(full, {GROUP: load}, None), PolicySpec(version=1, **spec), fleet)[0]


def speeds(each: Scalable) -> dict[str, float]:
    return {unit.facts.pool: unit.speed for unit in each.units}


def place(unit: Unit | None) -> str | None:
    return None if unit is None else unit.facts.pool


def anywhere(_: Unit) -> bool:
    return True


def test_the_home_unit_comes_first_and_alone_has_a_floor() -> None:
    each = group({GROUP: at(1)})
    assert [(unit.facts.name, unit.floor) for unit in each.units] == [
        ("experts-0", 1),
        ("experts-0-h100", 0),
        ("experts-0-t4", 0),
    ]


def test_a_measured_speed_counts_before_the_configured_one_and_the_mean_of_others_for_the_rest() -> None:
    load = GroupLoad(1.0, speed_rows_per_s={"default": 100.0, "h100": 300.0, "t4": 0.0})
    assert speeds(group({GROUP: at(1)}, load)) == {"default": 100.0, "h100": 300.0, "t4": 200.0}
    assert speeds(group({GROUP: at(1)}, load, speed=50.0)) == {"default": 100.0, "h100": 300.0, "t4": 50.0}


def test_where_no_speed_is_known_all_pools_are_equal() -> None:
    each = group({GROUP: at(2)}, GroupLoad(1.0))
    assert speeds(each) == {"default": 1.0, "h100": 1.0, "t4": 1.0}
    assert not each.speed_known
    assert each.capacity == 2


LOAD = GroupLoad(1.0, speed_rows_per_s={"default": 100.0, "h100": 300.0, "t4": 40.0})
COSTS = {"default": {"cost": 1.0}, "h100": {"cost": 4.0}, "t4": {"cost": 0.3}}


def test_growth_goes_where_speed_is_cheapest_and_there_is_room() -> None:
    each = group({GROUP: at(1)}, LOAD, pools=COSTS)
    assert place(each.to_grow(anywhere)) == "t4"
    assert place(each.to_grow(lambda unit: unit.facts.pool != "t4")) == "default"
    next(unit for unit in each.units if unit.facts.pool == "t4").blocked = True
    assert place(each.to_grow(anywhere)) == "default"
    assert place(each.to_grow(lambda _: False)) is None


def test_growth_keeps_to_the_pools_of_the_policy_and_to_serves_bound() -> None:
    each = group({GROUP: at(1)}, LOAD, pools=COSTS, defaults={"pools": ["h100"]})
    assert place(each.to_grow(anywhere)) == "h100"
    full = group({GROUP: at(1), "experts-0-h100": at(8)}, LOAD, defaults={"pools": ["h100"]})
    assert full.to_grow(anywhere) is None


def test_shrinking_takes_the_dearest_speed_first_and_the_last_one_at_home_never() -> None:
    each = group({GROUP: at(1), "experts-0-h100": at(1), "experts-0-t4": at(1)}, LOAD, pools=COSTS)
    order = []
    while (unit := each.to_shrink()) is not None:
        order.append(unit.facts.pool)
        unit.target -= 1
    assert order == ["h100", "t4"]


def test_shrinking_takes_first_what_may_not_run_there_any_more() -> None:
    each = group({GROUP: at(1), "experts-0-t4": at(1), "experts-0-h100": at(1)}, LOAD, defaults={"pools": ["h100"]})
    assert place(each.to_shrink()) == "t4"
    assert each.capacity == 300


@pytest.mark.parametrize(("down", "fits"), [(299.0, True), (300.0, True), (301.0, False)])
def test_a_replica_can_go_where_the_others_have_the_capacity(down: float, fits: bool) -> None:
    each = group({GROUP: at(4)}, LOAD)
    each.need = Need(0.0, down)
    assert (each.fits_less() is not None) is fits


def test_a_ready_replica_stays_while_the_others_are_only_starting() -> None:
    each = group({GROUP: at(2), "experts-0-h100": UnitCounts(0, 1)}, LOAD, pools={"h100": {"cost": 0.1}})
    each.need = Need(0.0, 200.0)
    assert place(each.to_shrink()) == "default"
    assert each.fits_less() is None
    each.need = Need(0.0, 100.0)
    assert place(each.fits_less()) == "default"


def test_absurd_counts_are_clamped_and_units_without_counts_left_out() -> None:
    fleet = Fleet({GROUP: UnitFacts(GROUP, GROUP), ROUTER: UnitFacts(ROUTER, None)}, 8)
    found = scalables(Signals({GROUP: UnitCounts(-3, 10**30, -1)}, {}, None), PolicySpec(version=1), fleet)
    assert [each.name for each in found] == [GROUP]
    unit = found[0].units[0]
    assert (unit.ready, unit.before, unit.leaving) == (0, 1_000_000, 0)
