"""One turn with the API server: read what is due, change what is wanted, keep what was last known, say what is wrong.

    RayService ──status──> active, pending ──> the RayCluster that is ours ──> worker groups
                                                      └── minReplicas: read, planned, patched, again after a conflict

Which RayCluster: the one this process runs in, while it is the active or the pending one; where that is not known, the
active one is read and both are pre-warmed. During an upgrade each cluster's own process looks after its own, so that
the new one is warm before it takes over; one that is neither any more is left alone.

Nothing is raised: troubles are sentences in what a turn returns, logged once. A turn blocks, at worst for the deadlines
of a few requests. After a failure its part is left alone for a while (`backoff`), the other parts go on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cluster.nodes.api import Api, ApiTrouble, ConflictTrouble, ForbiddenTrouble, MissingTrouble, connect
from cluster.nodes.backoff import Backoff
from cluster.nodes.inventory import Node, WorkerGroup, worker_groups
from cluster.nodes.node_watch import NodeWatch
from cluster.nodes.place import Place
from cluster.nodes.prewarm import Plan, Raised, Seat, machines, plan

logger = logging.getLogger(__name__)

READ_S = 15.0
"""How often RayService and RayCluster are read."""
NEWS_S = 2.0
"""How soon again, at the earliest, because something else is wanted."""
TRIES = 5
"""Attempts of one change against conflicts, in one turn."""


@dataclass(frozen=True)
class Prewarm:
    """Replicas to have machines for. may_release: whether what is not wanted is let go.

    patterns: names of the worker groups that may be raised.
    """

    seats: tuple[Seat, ...] = ()
    may_release: bool = True
    patterns: tuple[str, ...] = ("*",)


@dataclass(frozen=True)
class Wish:
    """What is wanted of a turn. nodes: whether the nodes are to be known. prewarm: None to leave it all alone."""

    nodes: bool = False
    prewarm: Prewarm | None = None


@dataclass(frozen=True)
class Seen:
    """What is known. groups, nodes: None before they were read once. groups_at, nodes_at: when, by the turn's clock.

    raised: worker group -> what its minReplicas was and is. answered: the last wish that has been met as far as it can.
    troubles: one sentence each.
    """

    groups: tuple[WorkerGroup, ...] | None = None
    groups_at: float = float("-inf")
    nodes: tuple[Node, ...] | None = None
    nodes_at: float = float("-inf")
    raised: Mapping[str, Raised] = field(default_factory=dict)
    answered: Prewarm | None = None
    troubles: tuple[str, ...] = ()


class Keeper:
    """place: where. clock: monotonic seconds. connecting: makes an `Api`, for tests."""

    def __init__(self, place: Place, clock: Callable[[], float], connecting: Callable[[Place], Api] = connect) -> None:
        self._place = place
        self._clock = clock
        self._connecting = connecting
        self._api: Api | None = None
        self._watch: NodeWatch | None = None
        self._service = place.rayservice
        self._groups: tuple[WorkerGroup, ...] | None = None
        self._groups_at = float("-inf")
        self._raised: dict[str, Raised] = {}
        self._notes: tuple[str, ...] = ()
        self._tried_at = self._due_at = self._change_due_at = float("-inf")
        self._wanted: Prewarm | None = None
        self._answered: Prewarm | None = None
        self._backoffs = {"read": Backoff(), "change": Backoff()}
        self._troubles: dict[str, str] = {}

    def turn(self, wish: Wish) -> Seen:
        """Do what is due, by the clock and by the wish. -> all that is known."""
        now = self._clock()
        if now >= self._due_at or (self._is_news(wish) and now >= self._tried_at + NEWS_S):
            self._tried_at, self._wanted = now, wish.prewarm
            self._attempt("read", lambda: self._read_and_change(wish))
        if wish.nodes and self._api is not None:
            self._watch = self._watch or NodeWatch(self._api)
        elif self._watch is not None:
            self._watch.stop()
            self._watch = None
        return self._seen()

    def close(self) -> None:
        """The thread that watches nodes ends soon."""
        if self._watch is not None:
            self._watch.stop()

    def _is_news(self, wish: Wish) -> bool:
        # Not while the server is left alone: a wish changes with every replica that comes.
        return wish.prewarm != self._wanted and "read" not in self._troubles

    def _read_and_change(self, wish: Wish) -> None:
        self._api = self._api or self._connecting(self._place)
        names = self._children(self._api)
        for index, name in enumerate(names):
            try:
                found = self._api.raycluster(name)
            except MissingTrouble:
                # A pending one that was just named, or the active one that was just replaced: there is a next turn.
                if index == 0:
                    raise
                continue
            if index == 0:
                self._groups, self._groups_at = worker_groups(found), self._clock()
            if wish.prewarm is not None and self._clock() >= self._change_due_at:
                self._attempt("change", partial(self._change, name, found, wish.prewarm, index == 0))

    def _children(self, api: Api) -> list[str]:
        """The RayClusters to look after, the one that is read first."""
        own = self._place.own_cluster
        if self._service is None and own is not None:
            self._service = _owner(api.raycluster(own))
            if self._service is None:
                return [own]  # a RayCluster of its own, which no RayService has made
        assert self._service is not None
        status = api.rayservice(self._service).get("status") or {}
        parts = (status.get("activeServiceStatus") or {}, status.get("pendingServiceStatus") or {})
        names = [str(part["rayClusterName"]) for part in parts if part.get("rayClusterName")]
        if own is not None:
            if own not in names:
                raise MissingTrouble(
                    f"RayService {self._service!r} names {own!r} neither active nor pending: it is on its way out"
                )
            return [own]
        if not names:
            raise MissingTrouble(f"RayService {self._service!r} has no active RayCluster yet")
        return names

    def _change(self, name: str, found: Mapping[str, Any], prewarm: Prewarm, is_ours: bool) -> None:
        """Raise or let go what differs from what is wanted, by the state that was read; read again after a conflict."""
        assert self._api is not None
        for left in reversed(range(TRIES)):
            made = self._plan(found, prewarm)
            try:
                if made.patch:
                    self._api.patch_raycluster(name, made.patch)
                    _log(name, made.raised)
                break
            except ConflictTrouble:
                if not left:
                    raise
                found = self._api.raycluster(name)
        if is_ours:
            self._raised, self._notes, self._answered = dict(made.raised), made.notes, prewarm

    def _plan(self, found: Mapping[str, Any], prewarm: Prewarm) -> Plan:
        wanted, notes = machines(prewarm.seats, worker_groups(found), prewarm.patterns)
        made = plan(found, wanted, prewarm.may_release)
        return Plan(made.patch, made.raised, (*made.notes, *notes))

    def _attempt(self, part: str, work: Callable[[], None]) -> None:
        """Do it, or remember why not and until when to leave it alone."""
        backoff = self._backoffs[part]
        try:
            work()
        except Exception as error:
            wait_s = backoff.failed(type(error))
            sentence = str(error) if isinstance(error, ApiTrouble) else f"what was read makes no sense: {error!r}"
            again = " and is asked again only now and then" if isinstance(error, ForbiddenTrouble) else ""
            self._complain(part, sentence + again)
        else:
            wait_s = READ_S if part == "read" else 0.0
            backoff.succeeded()
            self._troubles.pop(part, None)
        if part == "read":
            self._due_at = self._clock() + wait_s
        else:
            self._change_due_at = self._clock() + wait_s

    def _complain(self, part: str, sentence: str) -> None:
        if self._troubles.get(part) != sentence:
            logger.warning("kubernetes: %s", sentence)
        self._troubles[part] = sentence

    def _seen(self) -> Seen:
        watch = self._watch
        nodes = None if watch is None or watch.nodes is None else tuple(watch.nodes.values())
        if watch is None or watch.trouble is None:
            self._troubles.pop("nodes", None)
        else:
            self._complain("nodes", watch.trouble)
        troubles = tuple(f"kubernetes: {sentence}" for sentence in self._troubles.values())
        return Seen(
            groups=self._groups,
            groups_at=self._groups_at,
            nodes=nodes,
            nodes_at=float("-inf") if watch is None else watch.seen_at,
            raised=self._raised,
            answered=self._answered,
            troubles=(*troubles, *self._notes),
        )


def _owner(raycluster: Mapping[str, Any]) -> str | None:
    """The RayService that has made this RayCluster."""
    for owner in (raycluster.get("metadata") or {}).get("ownerReferences") or []:
        if owner.get("kind") == "RayService":
            return str(owner.get("name"))
    return None


def _log(name: str, raised: Mapping[str, Raised]) -> None:
    now = ", ".join(f"{group} {each.found} -> {each.set}" for group, each in sorted(raised.items()))
    logger.info("prewarm: minReplicas of RayCluster %s: %s", name, now or "all as they were found")
