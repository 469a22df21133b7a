"""Bytes of many routers: folding changes no sum and bounds the memory. Milliseconds."""

from __future__ import annotations

from cluster.transport_totals import KEPT_FOLDED, TransportTotals


def test_folding_keeps_the_sum_and_ignores_what_comes_later() -> None:
    totals = TransportTotals()
    totals.take("a", {"stream": 5, "object_store": 1})
    totals.take("a", {"stream": 7, "object_store": 1})
    totals.take("b", {"stream": 2})
    totals.fold("a")
    totals.fold("a")
    totals.fold("unheard")
    totals.take("a", {"stream": 8})
    assert totals.total() == {"stream": 9, "object_store": 1}


def test_memory_is_bounded_however_many_routers_are_killed() -> None:
    totals = TransportTotals()
    for number in range(KEPT_FOLDED + 50):
        totals.take(str(number), {"stream": 1})
        totals.fold(str(number))
    assert totals.total() == {"stream": KEPT_FOLDED + 50}
    assert (len(totals._by_router), len(totals._folded_ids)) == (0, KEPT_FOLDED)
