"""Reading the server's log of requests, and holding it against what clients say."""

from __future__ import annotations

from tests.chaos.access_log import contradictions, statuses_of

LOG = """INFO 2026-01-01 10:00:00,000 proxy 127.0.0.1 one -- POST /v1/completions 200 12.3ms
INFO 2026-01-01 10:00:00,100 proxy 127.0.0.1 two -- POST /v1/completions 429 1.0ms
INFO 2026-01-01 10:00:00,200 proxy 127.0.0.1 three -- GET /v1/cluster 200 1.0ms
WARNING 2026-01-01 10:00:00,250 proxy 127.0.0.1 two -- Client for request two disconnected, cancelling request.
INFO 2026-01-01 10:00:00,300 proxy 127.0.0.1 one -- POST /v1/completions 200 9.0ms
"""


def test_completions_are_found_by_their_names() -> None:
    assert statuses_of(LOG) == {"one": ["200", "200"], "two": ["429"]}


def test_who_is_there_once_with_the_status_its_client_saw_is_no_contradiction() -> None:
    assert not contradictions({"two": "429"}, statuses_of(LOG))
    assert not contradictions({"two": ""}, statuses_of(LOG))


def test_twice_never_and_otherwise_are_contradictions() -> None:
    found = contradictions({"one": "200", "two": "200", "four": ""}, statuses_of(LOG))
    assert [each.split()[0] for each in found] == ["one", "two", "four"]
    assert "2 times" in found[0]
    assert "0 times" in found[2]
