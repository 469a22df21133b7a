"""How expert replicas, routers and the Ingress talk to the Directory, in asyncio tasks that outlive its restarts.

A handle is anything whose `handle.method.remote(...)` can be awaited: a Serve handle, or a fake in tests. Every call
has a deadline; a Directory that is down costs log lines, never a replica or a router. Knows no Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.errors import DirectoryUnavailableError
from cluster.loads import LoadReport
from cluster.membership import Epoch, Replica, View
from cluster.stats import ReplicaStats, RouterStats
from deployments.view_keeper import PATIENCE_S, ViewKeeper

logger = logging.getLogger(__name__)

REPORT_PERIOD_S = 1.0
LOADS_PERIOD_S = 5.0
CHANGED_LOADS_PERIOD_S = 1.0
"""While rows are computed: 0.2 ms and 127 kB a report of 61 layers of 256 experts."""
CALL_TIMEOUT_S = 3.0
DEGRADED_TIMEOUT_S = 1.0
POLL_S = 5.0
BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0)


async def watch(
    handle: Any,
    on_view: Callable[[View], None],
    groups: Sequence[str],
    *,
    digest: str,
    on_heard: Callable[[], None] = lambda: None,
    poll_s: float = POLL_S,
    patience_s: float = PATIENCE_S,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Long-poll the Directory for ever and call `on_view` with each view that differs from the one in use.

    digest: of this router's model, in hex: replicas of another one are none for it, not even to be counted.
    on_heard: called with every answer, whether anything has changed or not.
    While the Directory is down or restarting the last view stays in use. Ends by cancellation only.
    """
    keeper = ViewKeeper(groups, patience_s=patience_s)
    heard: Epoch | None = None
    used: View | None = None
    outage = Outage("no news from the directory, the last view stays in use")
    while True:
        left_s = keeper.patience_left_s(clock())
        wait_s = poll_s if left_s is None else min(poll_s, left_s)
        try:
            everybody: View = await call(handle.view.remote(heard, wait_s), wait_s + CALL_TIMEOUT_S)
            on_heard()
            view = everybody.of(digest)
            chosen = keeper.accept(view, clock())
            if chosen != used:
                on_view(chosen)
            heard, used = view.epoch, chosen
            outage.over()
        except Exception as error:
            outage.failed(error)
            await asyncio.sleep(BACKOFF_S[min(outage.failures, len(BACKOFF_S)) - 1])


class Registration:
    """Keeps one expert replica in the Directory: reports its state and load every second until it leaves.

    stats: called for each report, in the loop's thread; must be quick. on_refused: called once if the Directory refuses
    the replica's id; such a replica must not serve. All methods belong to one asyncio loop.
    """

    def __init__(
        self,
        handle: Any,
        replica: Replica,
        stats: Callable[[], ReplicaStats],
        *,
        on_refused: Callable[[], None],
        period_s: float = REPORT_PERIOD_S,
    ) -> None:
        self._handle = handle
        self._replica = replica
        self._stats = stats
        self._on_refused = on_refused
        self._period_s = period_s
        self._task: asyncio.Task[None] | None = None
        self._outage = Outage(f"replica {replica.id} cannot report to the directory")
        self._ended = False

    def start(self) -> None:
        """Begin to report. Idempotent."""
        if self._task is None and not self._ended:
            self._task = background(self._report_forever())

    async def update(self, replica: Replica) -> None:
        """What the replica is from now on (its new state, its measured speed); reported at once. Never raises."""
        self._replica = replica
        if not self._ended:
            await self._report()

    async def leave(self) -> None:
        """Stop reporting and say so; a Directory that cannot be told finds out by the silence. Idempotent."""
        if self._ended:
            return
        self._ended = True
        await cancel(self._task)
        try:
            await call(self._handle.leave.remote(self._replica.id))
        except Exception as error:
            logger.warning("replica %s could not deregister: %r", self._replica.id, error)

    async def _report_forever(self) -> None:
        while not self._ended:
            await self._report()
            await asyncio.sleep(self._period_s)

    async def _report(self) -> None:
        try:
            taken: bool = await call(self._handle.report.remote(self._replica, self._stats()))
        except Exception as error:
            self._outage.failed(error)
            return
        self._outage.over()
        if not taken and not self._ended:
            self._ended = True
            logger.error("the directory refuses replica %s; it must not serve", self._replica.id)
            self._on_refused()


class RouterLink:
    """A router's side: its view of the cluster, its heartbeat, its loads, its complaints. Belongs to one asyncio loop.

    digest: of its model, in hex. on_view: called in that loop with each new view to use. stats: called once a period
    and by nobody else, so that it may measure intervals; must be quick. loads: so must it be; called
    once a second and at the end, told then if rows have come since, and every `loads_period_s` whether or not.
    """

    def __init__(
        self,
        handle: Any,
        groups: Sequence[str],
        *,
        digest: str,
        on_view: Callable[[View], None],
        stats: Callable[[], RouterStats],
        loads: Callable[[], LoadReport],
        period_s: float = REPORT_PERIOD_S,
        loads_period_s: float = LOADS_PERIOD_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._handle = handle
        self._groups = tuple(groups)
        self._digest = digest
        self._on_view = on_view
        self._stats = stats
        self._loads = loads
        self._period_s = period_s
        self._loads_period_s = loads_period_s
        self._clock = clock
        self._heard_s = clock()
        self._said_last = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._complaints: dict[str, asyncio.Task[None]] = {}
        self._name = "that has not reported yet"

    def start(self) -> None:
        """Begin to watch and to report. Idempotent."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._heard()
            watching = watch(self._handle, self._on_view, self._groups, digest=self._digest, on_heard=self._heard)
            work = (watching, self._report_forever(), self._report_loads_forever())
            self._tasks = [background(each) for each in work]

    @property
    def view_age_s(self) -> float:
        """Seconds since the Directory last answered, or since the start; about `POLL_S` where nothing changes."""
        return self._clock() - self._heard_s

    def _heard(self) -> None:
        self._heard_s = self._clock()

    async def stop(self) -> None:
        """End all tasks, then tell the loads a last time. Idempotent."""
        for task in [*self._tasks, *self._complaints.values()]:
            await cancel(task)
        if self._loop is not None and not self._said_last:
            try:
                await call(self._handle.report_loads.remote(replace(self._loads(), last=True)))
                self._said_last = True
            except Exception as error:
                logger.warning("the directory does not hear this router's last loads: %r", error)

    def lost(self, replica_id: str) -> None:
        """Tell the Directory that this replica cannot be reached. From any thread; returns at once."""
        if self._loop is not None:
            # The engine's thread may outlive the loop for a moment, when a router stops.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._complain, replica_id)

    def _complain(self, replica_id: str) -> None:
        # One complaint at a time: a broken replica fails many batches in the same moment, and that is one fact.
        if replica_id not in self._complaints:
            task = background(self._send_complaint(replica_id))
            self._complaints[replica_id] = task
            task.add_done_callback(lambda _: self._complaints.pop(replica_id, None))

    async def _send_complaint(self, replica_id: str) -> None:
        try:
            await call(self._handle.lost.remote(replica_id, self._name))
        except Exception as error:
            logger.warning("could not tell the directory that replica %s is lost: %r", replica_id, error)

    async def _report_forever(self) -> None:
        outage = Outage("this router cannot report to the directory")
        while True:
            try:
                stats = replace(self._stats(), digest=self._digest, groups=self._groups, view_age_s=self.view_age_s)
                self._name = stats.id
                await call(self._handle.report_router.remote(stats))
                outage.over()
            except Exception as error:
                outage.failed(error)
            await asyncio.sleep(self._period_s)

    async def _report_loads_forever(self) -> None:
        # Totals each time: what the directory does not hear now it hears with the next.
        outage = Outage("this router cannot tell its loads to the directory")
        pause_s = min(self._loads_period_s, CHANGED_LOADS_PERIOD_S)
        told, silent_s = -1, 0.0
        while True:
            await asyncio.sleep(pause_s)
            silent_s += pause_s
            loads = self._loads()
            rows = sum(int(layer.sum()) for layer in loads.rows.values())
            if rows == told and silent_s < self._loads_period_s:
                continue
            try:
                await call(self._handle.report_loads.remote(loads))
                told, silent_s = rows, 0.0
                outage.over()
            except Exception as error:
                outage.failed(error)


class ClusterReader:
    """The Ingress's side: the bodies of `/health`, `/v1/cluster` and `/v1/cluster/loads`.

    targets: replicas per deployment that Serve works towards (`deployments.targets`).
    """

    def __init__(self, handle: Any, targets: Callable[[], Awaitable[Mapping[str, int]]]) -> None:
        self._handle = handle
        self._targets = targets

    async def health(self) -> tuple[bool, list[str], dict[str, str]]:
        """(ready, what is missing, reasons). Never raises: a Directory that does not answer is what is missing."""
        try:
            ready, missing, reasons = await call(self._handle.health.remote())
        except Exception as error:
            logger.warning("the directory does not answer: %r", error)
            return False, ["directory"], {}
        return ready, missing, reasons

    async def degraded(self) -> dict[str, str]:
        """What is wrong although requests can be answered: reason -> a sentence. Never raises."""
        try:
            found: dict[str, str] = await call(self._handle.degraded.remote(), DEGRADED_TIMEOUT_S)
        except Exception as error:
            # One of an older version has no such method; one that is down is told of by `health`.
            logger.debug("the directory does not say what is degraded: %r", error)
            return {}
        return found

    async def snapshot(self) -> dict[str, Any]:
        """The body of `/v1/cluster`.

        Raises:
            DirectoryUnavailableError: the Directory does not answer.
        """
        targets = dict(await self._targets())
        return await self._shown(self._handle.snapshot, targets)

    async def loads(self) -> dict[str, Any]:
        """The body of `/v1/cluster/loads`.

        Raises:
            DirectoryUnavailableError: the Directory does not answer.
        """
        return await self._shown(self._handle.loads)

    async def _shown(self, method: Any, *arguments: Any) -> dict[str, Any]:
        try:
            shown: dict[str, Any] = await call(method.remote(*arguments))
        except Exception as error:
            raise DirectoryUnavailableError("The directory does not answer; it may be restarting.") from error
        return shown


class Outage:
    """Logs the beginning and the end of a row of failures, not each of them."""

    def __init__(self, what: str) -> None:
        self._what = what
        self.failures = 0

    def failed(self, error: Exception) -> None:
        """One more failure."""
        if self.failures == 0:
            logger.warning("%s: %r; trying on", self._what, error)
        self.failures += 1

    def over(self) -> None:
        """A success."""
        if self.failures:
            logger.info("%s: over after %d failures", self._what, self.failures)
        self.failures = 0


async def call(response: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
    """Await a handle's response for at most `timeout_s`; a call nobody waits for any more is cancelled.

    Raises:
        TimeoutError: no answer in time. Otherwise whatever the call raised.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await response
    except (TimeoutError, asyncio.CancelledError):
        if hasattr(response, "cancel"):
            response.cancel()
        raise


def background(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Run `work` in a task without the caller's context, lest its calls pass for parts of the caller's request."""
    return asyncio.get_running_loop().create_task(work, context=contextvars.Context())


async def cancel(task: asyncio.Task[None] | None) -> None:
    """Cancel the task and wait until it has ended."""
    if task is not None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
