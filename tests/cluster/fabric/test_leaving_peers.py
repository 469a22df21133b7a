"""Who gets rows while replicas leave: those that are ready, and those that leave only where nobody is. Milliseconds."""

from __future__ import annotations

from cluster.fabric.peers import Peers
from cluster.membership import Address, Epoch, Replica, State, View


def usable(*members: tuple[str, State]) -> set[str]:
    """Ids that may get rows of experts-0."""
    here = Address("n", "", "", 0)
    replicas = tuple(Replica(name, "experts-0", "default", here, "ab" * 32, 1.0, state) for name, state in members)
    peers = Peers()
    peers.adopt(View(Epoch("one", 1), replicas))
    return {peer.replica.id for peer in peers.usable("experts-0", 0.0)}


def test_a_replica_that_leaves_gets_no_rows_while_another_is_ready() -> None:
    assert usable(("a", State.DRAINING), ("b", State.READY)) == {"b"}


def test_where_nobody_is_ready_those_that_leave_go_on_serving() -> None:
    assert usable(("a", State.DRAINING), ("b", State.JOINING)) == {"a"}
    assert usable(("a", State.DRAINING), ("b", State.DRAINING)) == {"a", "b"}


def test_one_that_still_starts_gets_none_in_any_case() -> None:
    assert usable(("a", State.JOINING)) == set()
