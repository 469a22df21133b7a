"""The nodes of the cluster, listed once and then watched: in a thread of its own, as a watch blocks.

    list ──> watch from the version listed ──> events ──> (server ends it) watch on
      ^            │ 410, the version is gone: list anew
      └── back-off ┴ anything else

What was last known stays, with the moment it was last known to hold; the thread ends with the object it serves.
"""

from __future__ import annotations

import threading
import time
import weakref

from cluster.nodes.api import Api, ApiTrouble, ForbiddenTrouble, GoneTrouble
from cluster.nodes.backoff import Backoff
from cluster.nodes.inventory import Node, node_of

WATCH_S = 30.0
"""How long one watch lasts: while nothing happens, its end is what shows that the nodes are still as they were."""


class NodeWatch:
    """`nodes`: name -> node, None before the first list. seen_at: monotonic seconds. trouble: why they grow old."""

    def __init__(self, api: Api, watch_s: float = WATCH_S) -> None:
        self.nodes: dict[str, Node] | None = None
        self.seen_at = float("-inf")
        self.trouble: str | None = None
        self._api = api
        self._watch_s = watch_s
        self._version: str | None = None
        self._stopped = threading.Event()
        self._backoff = Backoff()
        loop = _loop(weakref.ref(self), self._stopped)
        threading.Thread(target=loop, name="node-watch", daemon=True).start()

    def stop(self) -> None:
        """Soon: a watch that is open ends by itself."""
        self._stopped.set()

    def turn(self) -> float:
        """List or watch once. -> seconds to wait before the next."""
        try:
            if self._version is None:
                self._list()
            self._watch(self._version or "")
            self._backoff.succeeded()
            self.trouble = None
            return 0.0
        except GoneTrouble:
            self._version = None
            # A server that forgets at once must not be asked in a loop.
            return self._backoff.failed(GoneTrouble)
        except ApiTrouble as trouble:
            self._version = None if isinstance(trouble, ForbiddenTrouble) else self._version
            self.trouble = str(trouble)
            return self._backoff.failed(type(trouble))

    def _list(self) -> None:
        listed, version = self._api.nodes()
        self.nodes = {node.name: node for node in map(node_of, listed)}
        self._version, self.trouble = version, None
        self.seen_at = time.monotonic()

    def _watch(self, version: str) -> None:
        nodes = dict(self.nodes or {})
        for event in self._api.watch_nodes(version, self._watch_s):
            item = event["object"]
            self._version = str((item.get("metadata") or {}).get("resourceVersion") or self._version)
            if event["type"] != "BOOKMARK":
                node = node_of(item)
                if event["type"] == "DELETED":
                    nodes.pop(node.name, None)
                else:
                    nodes[node.name] = node
                # Replaced, not changed: readers hold the old one.
                self.nodes = dict(nodes)
            self.seen_at, self.trouble = time.monotonic(), None
            self._backoff.succeeded()
            if self._stopped.is_set():
                return
        self.seen_at = time.monotonic()


def _loop(watch: weakref.ref[NodeWatch], stopped: threading.Event):  # type: ignore[no-untyped-def]
    def run() -> None:
        while not stopped.is_set() and (owner := watch()) is not None:
            wait_s = owner.turn()
            del owner
            stopped.wait(wait_s)

    return run
