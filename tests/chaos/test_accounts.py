"""What a soak calls a fault."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.chaos.accounts import SMALL, Accounts, Report
from tests.chaos.processes import Footprint

MIB = 1 << 20
ROUTERS = Footprint(1000 * MIB, 400, 200, 2)


def report(**changes: Any) -> Report:
    """Of 1,200 s in which nothing went wrong, but for the changes."""
    sound: dict[str, Any] = {
        "seconds": 1200.0,
        "accounts": Accounts(sent=10, finished=7, cancelled=2, refused=1),
        "troubles": Counter({"kill router": 10}),
        "missed": Counter[str](),
        "kinds": {"Router": (ROUTERS, ROUTERS)},
        "left": [],
        "slowest_s": 1.0,
        "named": 10,
        "contradictions": [],
    }
    return Report(**(sound | changes))


def test_nothing_wrong_is_no_fault() -> None:
    assert not report().faults


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"accounts": Accounts(sent=10, finished=9)}, "1 requests are unaccounted for"),
        ({"accounts": Accounts(sent=10, finished=11)}, "-1 requests are unaccounted for"),
        ({"accounts": Accounts(sent=2, finished=1, failures=["broken"])}, "failed: broken"),
        ({"accounts": Accounts(sent=1, finished=1, different=["x"])}, "other text: x"),
        ({"left": ["a page"]}, "left over: a page"),
        ({"contradictions": ["soak-3 is 2 times"]}, "server and client differ: soak-3 is 2 times"),
        ({"troubles": Counter({"kill router": 9})}, "kill router: hit somebody 9 times, not 10"),
        ({"troubles": Counter({"a": 10}), "missed": Counter({"b": 12})}, "b: hit somebody 0 times, not 10"),
    ],
)
def test_a_fault_is_named(changes: dict[str, Any], fault: str) -> None:
    assert report(**changes).faults == [fault]


def test_a_kind_that_grows_is_a_fault_however_small_its_share_of_all() -> None:
    small = Footprint(100 * MIB, 30, 20, 1)
    grown = Footprint(small.rss_bytes + SMALL.rss_bytes + 1, 30, 20, 1)
    [fault] = report(kinds={"Router": (ROUTERS, ROUTERS), "Directory": (small, grown)}).faults
    assert fault.startswith("Directory: rss grew")


def test_a_small_kind_may_grow_by_what_is_made_once() -> None:
    small = Footprint(100 * MIB, 30, 20, 1)
    grown = Footprint(small.rss_bytes + SMALL.rss_bytes, 30 + SMALL.files, 20 + SMALL.threads, 1)
    assert not report(kinds={"Router": (ROUTERS, ROUTERS), "Directory": (small, grown)}).faults


def test_all_together_may_not_grow_even_where_every_kind_stays_within_its_bounds() -> None:
    kinds = {str(n): (Footprint(100 * MIB, 30, 20, 1), Footprint(107 * MIB, 30, 20, 1)) for n in range(5)}
    assert report(kinds=kinds).faults == ["all processes: rss grew by 7.0%"]


def test_the_json_is_flat_and_says_how_many_were_found_in_the_log() -> None:
    shown = report(contradictions=["soak-3 is 0 times"]).as_json()
    assert (shown["in_server_log"], shown["contradictions"]) == (9, 1)
    assert not [name for name, value in shown.items() if isinstance(value, dict)]
