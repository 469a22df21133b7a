"""The nodes of the cluster, listed once and then watched: in a thread of its own, as a watch blocks.

    list ──> watch from the version listed ──> events ──> (server ends it) watch on
      ^            │ 410, the version is gone; ended at once; an odd object: list anew
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
SHORT_S = 0.5
"""A watch without news that ends sooner was none: it must not be asked for in a loop."""


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
        except Exception as error:
            self._version = None
            self.trouble = f"what was read of nodes makes no sense: {error!r}"
            return self._backoff.failed(type(error))

    def _list(self) -> None:
        listed, version = self._api.nodes()
        self.nodes = {node.name: node for node in map(node_of, listed)}
        self._version, self.trouble = version, None
        self.seen_at = time.monotonic()

    def _watch(self, version: str) -> None:
        nodes = dict(self.nodes or {})
        since, is_news = time.monotonic(), False
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
                self.nodes, is_news = dict(nodes), True
                self.trouble = None
                self._backoff.succeeded()
            self.seen_at = time.monotonic()
            if self._stopped.is_set():
                return
        if not is_news and time.monotonic() - since < SHORT_S:
            self._version = None
            raise ApiTrouble("the API server ends each watch of nodes at once")
        self.seen_at = time.monotonic()


def _loop(watch: weakref.ref[NodeWatch], stopped: threading.Event):  # type: ignore[no-untyped-def]
    def run() -> None:
        while not stopped.is_set() and (owner := watch()) is not None:
            wait_s = owner.turn()
            del owner
            stopped.wait(wait_s)

    return run
