"""What the policy must ask and tell while a tick may not wait: the Serve controller's details, the Directory's ear.

A thread of its own with an event loop of its own, inside the controller's process: handles may need a loop, and the
controller's is not to be held up. It reads the instance details of the application (its arguments,
and which replicas are still stopping), hands decisions to the Directory, and publishes the policy's metrics. Every
answer has a deadline; failures are logged once and tried again. The thread ends with the object it serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve

from cluster.decisions import PolicyReport
from cluster.metering import PERIOD_S, Meter, Publishing, Source
from cluster.ray_metrics import RayInstruments

logger = logging.getLogger(__name__)

BUSY_PERIOD_S, IDLE_PERIOD_S = 0.5, 30.0
"""How often details are read: while replicas come or go, and otherwise. They cost the controller milliseconds."""
REPORT_PERIOD_S, NEWS_PERIOD_S = 5.0, 0.5
"""How often the Directory is told what it knows already, and at most what it does not."""
LIVELY_S = 10.0
"""A policy that has reported nothing for longer is asked no more; the Directory must not hear of it as if it were."""
POLL_S = 0.1
DETAILS_TIMEOUT_S, REPORT_TIMEOUT_S = 5.0, 3.0
STOPPING = "STOPPING"


@dataclass(frozen=True)
class Details:
    """What the controller says of one application.

    args: as deployed. stopping: deployment -> replicas on their way out.
    asked_at: monotonic seconds, before the question.
    """

    args: Mapping[str, Any]
    stopping: Mapping[str, int]
    asked_at: float


class ControllerLink:
    """`latest`, `watch_closely` and `report` return at once; everything else happens in the thread.

    metrics: what is published; asked in the thread.
    """

    def __init__(self, application: str, directory: str, metrics: Source = lambda _meter: None) -> None:
        self._application = application
        # Serve's controller is no replica, and may scale several applications: what they count must not be mixed up.
        self._publishing = Publishing(metrics, Meter(RayInstruments({"application": application})))
        self._directory = directory
        self._lock = threading.Lock()
        self._details: Details | None = None
        self._busy = True
        self._report: PolicyReport | None = None
        self._reported_at = float("-inf")
        self._unsent = False
        self._complaints: dict[str, str] = {}
        self._handle: Any = None
        work = _run(weakref.ref(self))
        threading.Thread(target=lambda: asyncio.run(work), name="autoscale-link", daemon=True).start()

    @property
    def latest(self) -> Details | None:
        """The newest details; None before the first."""
        return self._details

    def watch_closely(self, busy: bool) -> None:
        """Whether replicas are coming or going."""
        self._busy = busy

    def report(self, report: PolicyReport) -> None:
        """To be told to the Directory soon, and again now and then, in case it has restarted."""
        with self._lock:
            self._unsent = self._unsent or report != self._report
            self._report, self._reported_at = report, time.monotonic()

    def publish(self) -> None:
        """Tell the metrics once."""
        self._publishing.turn()

    async def turn(self, due: _Due) -> None:
        """One look at what is due."""
        now = time.monotonic()
        if now >= due.details_at or (self._busy and now >= due.details_asked_at + BUSY_PERIOD_S):
            due.details_asked_at, due.details_at = now, now + IDLE_PERIOD_S
            with self._complaining("the Serve controller does not say what it runs"):
                await self._read_details(now)
        with self._lock:
            is_due = now >= due.report_at or (self._unsent and now >= due.news_at)
            is_due = is_due and now - self._reported_at <= LIVELY_S
            report = self._report if is_due else None
            self._unsent = self._unsent and not is_due
        if report is not None:
            due.report_at, due.news_at = now + REPORT_PERIOD_S, now + NEWS_PERIOD_S
            with self._complaining("the directory cannot be told what was decided"):
                await self._tell(report)

    async def _read_details(self, now: float) -> None:
        # The lookup blocks on the GCS; the names are Serve's own constants, the same since Serve 2.0.
        async with asyncio.timeout(DETAILS_TIMEOUT_S):
            controller = await asyncio.to_thread(ray.get_actor, "SERVE_CONTROLLER_ACTOR", namespace="serve")
            answer = await controller.get_serve_instance_details.remote()
        application = answer["applications"].get(self._application)
        if application is None or not application.get("deployed_app_config"):
            return
        self._details = Details(
            args=application["deployed_app_config"].get("args") or {},
            stopping={
                name: Counter(_state(replica) for replica in deployment["replicas"])[STOPPING]
                for name, deployment in application["deployments"].items()
            },
            asked_at=now,
        )

    async def _tell(self, report: PolicyReport) -> None:
        if self._handle is None:
            self._handle = serve.get_deployment_handle(self._directory, self._application)
        async with asyncio.timeout(REPORT_TIMEOUT_S):
            await self._handle.report_policy.remote(report)

    @contextlib.contextmanager
    def _complaining(self, what: str) -> Iterator[None]:
        """Log a failure when it is a new one; it is tried again in any case."""
        try:
            yield
        except Exception as error:
            if self._complaints.get(what) != repr(error):
                logger.warning("%s: %r; trying on", what, error)
            self._complaints[what] = repr(error)
        else:
            self._complaints.pop(what, None)


@dataclass
class _Due:
    """When the thread has to do something again; monotonic seconds."""

    details_at: float = 0.0
    details_asked_at: float = 0.0
    report_at: float = 0.0
    news_at: float = 0.0


async def _run(link: weakref.ref[ControllerLink]) -> None:
    await asyncio.gather(_take_turns(link), _publish(link))


async def _publish(link: weakref.ref[ControllerLink]) -> None:
    # Beside the turns: these may wait for seconds for who does not answer, and that is when metrics are looked at.
    while (owner := link()) is not None:
        owner.publish()
        del owner
        await asyncio.sleep(PERIOD_S)


async def _take_turns(link: weakref.ref[ControllerLink]) -> None:
    due = _Due()
    while (owner := link()) is not None:
        await owner.turn(due)
        del owner
        await asyncio.sleep(POLL_S)


def _state(replica: Mapping[str, Any]) -> str:
    """The name of a replica's state, an enum or its value depending on how the details were made."""
    state = replica["state"]
    return str(getattr(state, "value", state))
