"""Nodes listed and watched against the double of the API, over HTTP. The thread is the real one."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.nodes.api import Api, GoneTrouble
from cluster.nodes.node_watch import NodeWatch
from tests.cluster.nodes.objects import node
from tests.kube_double import KubernetesDouble
from tests.serving import wait_for


def names(watch: NodeWatch) -> set[str]:
    return set(watch.nodes or {})


def test_nodes_come_go_and_change_as_events_say(double: KubernetesDouble, api: Api) -> None:
    double.put(node("a", 1))
    watch = NodeWatch(api)
    wait_for(lambda: names(watch) == {"a"}, 10, "the list")
    double.put(node("b", 4))
    wait_for(lambda: names(watch) == {"a", "b"}, 10, "a node that was added")
    double.change("nodes", "b", {"spec": {"unschedulable": True}})
    wait_for(lambda: not (watch.nodes or {})["b"].usable, 10, "a node that was closed")
    double.delete("nodes", "a")
    wait_for(lambda: names(watch) == {"b"}, 10, "a node that was deleted")
    assert double.count("list", "nodes") == 1
    watch.stop()


def test_long_lists_come_in_pages(double: KubernetesDouble, api: Api) -> None:
    double.page_size = 3
    for number in range(8):
        double.put(node(f"n{number}"))
    listed, _ = api.nodes()
    assert len(listed) == 8
    assert double.count("list", "nodes") == 3


def test_a_version_that_is_gone_is_listed_anew(double: KubernetesDouble, api: Api) -> None:
    double.put(node("a"))
    watch = NodeWatch(api)
    wait_for(lambda: names(watch) == {"a"} and double.count("list", "nodes") == 1, 10, "the list")
    double.compact()
    double.put(node("b"))
    wait_for(lambda: names(watch) == {"a", "b"}, 10, "the second list")
    assert double.count("list", "nodes") == 2
    assert watch.trouble is None, "it is in the nature of watches"
    watch.stop()


def test_a_list_whose_next_page_is_gone_says_so(
    double: KubernetesDouble, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    double.page_size = 1
    for name in "ab":
        double.put(node(name))
    ask = Api._ask

    def compacting(self: Api, *args: object, **kwargs: object) -> object:
        answer = ask(self, *args, **kwargs)  # type: ignore[arg-type]
        double.compact()
        return answer

    monkeypatch.setattr(Api, "_ask", compacting)
    with pytest.raises(GoneTrouble):
        api.nodes()


def test_a_watch_that_the_server_ends_goes_on_where_it_was(double: KubernetesDouble, api: Api) -> None:
    double.put(node("a"))
    watch = NodeWatch(api, watch_s=1)
    wait_for(lambda: double.count("watch", "nodes") >= 2, 10, "the second watch")
    double.put(node("b"))
    wait_for(lambda: names(watch) == {"a", "b"}, 10, "an event of the second watch")
    assert double.count("list", "nodes") == 1
    watch.stop()


def test_an_outage_keeps_what_was_known_and_its_age(double: KubernetesDouble, api: Api) -> None:
    double.put(node("a"))
    watch = NodeWatch(api)
    wait_for(lambda: names(watch) == {"a"}, 10, "the list")
    with double.outage():
        wait_for(lambda: watch.trouble is not None, 10, "a sentence")
        seen_at = watch.seen_at
        assert names(watch) == {"a"}
    double.put(node("b"))
    wait_for(lambda: names(watch) == {"a", "b"}, 15, "what came after the outage")
    assert watch.seen_at > seen_at
    assert watch.trouble is None
    watch.stop()


class Scripted:
    """An API whose lists and watches are those given, the last one again and again."""

    def __init__(self, lists: list[Any], watches: list[Any]) -> None:
        self.lists, self.watches = lists, watches
        self.listed = self.watched = 0

    def nodes(self) -> tuple[list[dict[str, Any]], str]:
        self.listed += 1
        return self.lists.pop(0) if len(self.lists) > 1 else self.lists[0], str(self.listed)

    def watch_nodes(self, _version: str, _seconds: float) -> Iterator[dict[str, Any]]:
        self.watched += 1
        yield from self.watches.pop(0) if len(self.watches) > 1 else self.watches[0]


def unstarted(api: Any, monkeypatch: pytest.MonkeyPatch) -> NodeWatch:
    """Its turns are the test's."""
    monkeypatch.setattr(threading.Thread, "start", lambda _self: None)
    return NodeWatch(api)


@pytest.mark.parametrize("events", [[], [{"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "7"}}}]])
def test_watches_that_end_at_once_are_asked_for_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch, events: list[Any]
) -> None:
    script = Scripted([[node("a")], [node("a"), node("b")]], [events])
    watch = unstarted(script, monkeypatch)
    assert [watch.turn() for _ in range(4)] == [1, 2, 4, 8]
    assert "at once" in (watch.trouble or "")
    assert names(watch) == {"a", "b"}, "lists go on"


def test_an_odd_object_is_told_and_listed_anew_and_the_turns_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = {"type": "MODIFIED", "object": {"metadata": {"name": "a", "labels": "none"}}}
    script = Scripted([[node("a")], ["odd"], [node("b")]], [[odd], [{"type": "ADDED", "object": node("c")}]])
    watch = unstarted(script, monkeypatch)
    assert watch.turn() == 1
    assert "makes no sense" in (watch.trouble or "")
    assert watch.turn() == 2, "so is an odd list"
    assert names(watch) == {"a"}, "what was known stays"
    assert watch.turn() == 0
    assert (names(watch), watch.trouble) == ({"b", "c"}, None)


def test_a_watch_that_is_refused_as_gone_at_its_start_is_listed_anew(
    double: KubernetesDouble, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    double.put(node("a"))
    send, refused = Api._send, []

    def refusing(self: Api, verb: str, *args: Any, **kwargs: Any) -> Any:
        if verb == "watch" and not refused:
            refused.append(verb)
            raise self._trouble(SimpleNamespace(status=410, read=lambda: b"{}"), verb, "nodes", None)
        return send(self, verb, *args, **kwargs)

    monkeypatch.setattr(Api, "_send", refusing)
    watch = NodeWatch(api)
    wait_for(lambda: double.count("list", "nodes") == 2, 10, "the second list")
    assert watch.trouble is None
    watch.stop()


def test_the_thread_ends_with_the_object(double: KubernetesDouble, api: Api) -> None:
    double.put(node("a"))
    before = set(threading.enumerate())
    watch = NodeWatch(api, watch_s=1)
    (thread,) = (each for each in set(threading.enumerate()) - before if each.name == "node-watch")
    gone = weakref.ref(watch)
    del watch

    def ended() -> bool:
        gc.collect()
        return gone() is None and not thread.is_alive()

    wait_for(ended, 15, "the end of the thread")
