"""What a key may use: buckets by a clock of the test's own, and the leases of real requests (2 s)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import EngineError, ExpertScaleError, OverloadedError, RateLimitError, RequestError
from deployments.generation import GenerationRequest, TokenChunk
from deployments.ingress.api import create_app
from deployments.ingress.auth import Authenticator, Keys
from deployments.ingress.keys import KeyLimits, KeyRecord, digest_of
from deployments.ingress.limits import Lease, Limiter
from deployments.ingress.service import Service
from tests.deployments.ingress.fakes import FakeRouter, Script, http, make_service, says

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def key(name: str = "alice", **limits: int) -> KeyRecord:
    return KeyRecord(name, digest_of(name), KeyLimits(**limits))


def wait_s(limiter: Limiter, record: KeyRecord) -> int:
    """Retry-After of a request that is refused."""
    with pytest.raises(RateLimitError) as caught:
        limiter.admit(record)
    assert f"try again in {caught.value.retry_after_s} s." in str(caught.value)
    return caught.value.retry_after_s


def test_requests_come_back_at_their_rate_and_no_sooner() -> None:
    clock, record = Clock(), key(requests_per_min=6)
    limiter = Limiter(clock)
    for _ in range(6):
        limiter.admit(record)
    assert wait_s(limiter, record) == 10
    clock.now += 9.5
    assert wait_s(limiter, record) == 1
    clock.now += 0.5
    limiter.admit(record)
    clock.now += 3600
    for _ in range(6):  # an hour of silence saves up one minute's worth
        limiter.admit(record)
    wait_s(limiter, record)


def test_tokens_are_paid_when_a_request_has_ended_and_debts_before_the_next() -> None:
    clock, record = Clock(), key(tokens_per_min=60)
    limiter = Limiter(clock)
    with limiter.admit(record) as first, limiter.admit(record) as second:
        first.ended(59)
        second.ended(11)
    assert wait_s(limiter, record) == 11  # 10 in debt, and one to begin with
    clock.now += 10.5
    limiter.admit(record)


def test_streams_under_way_are_counted_whatever_else_is_limited() -> None:
    limiter, record = Limiter(Clock()), key(streams=2)
    with limiter.admit(record), limiter.admit(record):
        assert wait_s(limiter, record) == 1
    with limiter.admit(record):
        pass


def test_a_refused_request_uses_nothing_up() -> None:
    clock, record = Clock(), key(requests_per_min=2, streams=1)
    limiter = Limiter(clock)
    with limiter.admit(record):
        for _ in range(5):
            wait_s(limiter, record)
    with limiter.admit(record):
        pass
    with pytest.raises(RateLimitError, match="requests_per_min is 2"):
        limiter.admit(record)


def test_a_lease_counts_once_and_ends_with_its_block_or_an_error() -> None:
    clock, record = Clock(), key(streams=1, tokens_per_min=60)
    limiter = Limiter(clock)
    with limiter.admit(record) as kept:
        kept.keep()
    wait_s(limiter, record)
    for _ in range(3):
        kept.ended(50)
    lease = limiter.admit(record)
    lease.keep()
    with pytest.raises(ValueError, match="x"), lease:
        raise ValueError("x")
    limiter.admit(record)


def test_an_edited_limit_counts_at_once_and_forgives_nothing() -> None:
    clock = Clock()
    limiter = Limiter(clock)
    with limiter.admit(key(tokens_per_min=60)) as lease:
        lease.ended(120)
    assert wait_s(limiter, key(tokens_per_min=120)) == 31
    limiter.admit(key())  # no limit any more
    assert wait_s(limiter, key(tokens_per_min=60)) == 61


def test_a_widened_request_counts_as_its_streams_until_it_has_ended() -> None:
    limiter, record = Limiter(Clock()), key(streams=4)
    with limiter.admit(record) as wide, limiter.admit(record) as narrow:
        wide.widen(3)
        narrow.widen(1)
        wait_s(limiter, record)
    with limiter.admit(record) as lease:
        lease.widen(4)
        wait_s(limiter, record)
        lease.keep()
    wait_s(limiter, record)
    for _ in range(2):
        lease.ended(1)
    with limiter.admit(record) as lease:
        lease.widen(4)


def test_what_does_not_fit_beside_the_others_waits_and_counts_as_the_request_that_was_read() -> None:
    limiter, record = Limiter(Clock()), key(streams=4, requests_per_min=6)
    with limiter.admit(record) as first:
        first.widen(2)
        for _ in range(4):
            with (
                pytest.raises(RateLimitError, match="2 streams under way and asks for 3"),
                limiter.admit(record) as more,
            ):
                more.widen(3)
        with limiter.admit(record) as fits:
            fits.widen(2)
        with pytest.raises(RateLimitError, match="requests_per_min is 6"):
            limiter.admit(record)


def test_what_never_fits_is_the_requests_own_fault_and_gives_its_stream_back() -> None:
    limiter, record = Limiter(Clock()), key(streams=2)
    for _ in range(3):
        with pytest.raises(RequestError, match=r"makes 3 streams .* may have 2"), limiter.admit(record) as lease:
            lease.widen(3)
    with limiter.admit(None) as free:
        free.widen(1000)
    with limiter.admit(key("bob", requests_per_min=5)) as unlimited:
        unlimited.widen(1000)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.booleans()), max_size=60))
def test_never_more_streams_than_the_limit_and_none_left_behind(steps: list[tuple[int, int, bool]]) -> None:
    limiter, record = Limiter(Clock()), key(streams=5)
    open_: dict[int, tuple[Lease, int]] = {}
    for slot, streams, refused in steps:
        if slot in open_:
            open_.pop(slot)[0].ended(1)
            continue
        try:
            with limiter.admit(record) as lease:
                lease.widen(streams)
                if refused:
                    raise EngineError("x")
                lease.keep()
                open_[slot] = lease, streams
        except ExpertScaleError:
            pass
        assert sum(width for _, width in open_.values()) <= 5
    for lease, _ in open_.values():
        lease.ended(1)
    with limiter.admit(record) as whole:
        whole.widen(5)


def test_keys_do_not_share_and_a_key_without_limits_has_none() -> None:
    limiter = Limiter(Clock())
    limiter.admit(key("alice", streams=1))
    limiter.admit(key("bob", streams=1))
    wait_s(limiter, key("alice", streams=1))
    for _ in range(1000):
        limiter.admit(None)
        limiter.admit(key("carol"))


@given(st.integers(1, 100), st.lists(st.floats(0, 40), max_size=60))
def test_never_more_requests_than_a_full_bucket_and_the_rate(per_min: int, pauses: list[float]) -> None:
    clock, record = Clock(), key(requests_per_min=per_min)
    limiter = Limiter(clock)
    admitted = 0
    for pause in [*pauses, *[0.0] * per_min]:
        clock.now += pause
        try:
            limiter.admit(record)
            admitted += 1
        except RateLimitError as error:
            assert error.retry_after_s >= 1  # noqa: PT017 - not every call is refused
    assert admitted <= per_min + (clock.now - 1000) * per_min / 60 + 1e-6


def guarded(script: Script, **limits: int) -> tuple[Service, dict[str, str]]:
    """A service with one key of these limits, and the headers that send it."""
    auth = Authenticator(Keys((key(**limits),)))
    return make_service(script, auth=auth, limiter=Limiter(Clock())), {"authorization": "Bearer alice"}


def fails(error: ExpertScaleError, after: int = 0) -> Script:
    def script(request: GenerationRequest) -> Iterable[TokenChunk | Exception | str]:  # noqa: ARG001
        return [*[TokenChunk(0, (5,)) for _ in range(after)], error]

    return script


def hangs(request: GenerationRequest) -> Iterable[TokenChunk | Exception | str]:  # noqa: ARG001 - a script
    return [TokenChunk(0, (5,)), "hang"]


async def post(client: httpx.AsyncClient, **changes: Any) -> httpx.Response:
    return await client.post(CHAT, json=BODY | changes)


def test_a_limit_is_429_with_retry_after_and_its_name() -> None:
    async def story() -> httpx.Response:
        service, headers = guarded(says("x"), requests_per_min=2)
        async with http(service) as client:
            client.headers.update(headers)
            assert [(await post(client)).status_code for _ in range(2)] == [200, 200]
            return await post(client)

    response = asyncio.run(story())
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "rate_limit_exceeded")
    assert response.headers["retry-after"] == "30"
    assert "requests_per_min is 2" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_usage_is_charged_prompt_and_completion(stream: bool) -> None:
    async def story() -> httpx.Response:
        service, headers = guarded(says("hello"), tokens_per_min=60)
        async with http(service) as client:
            client.headers.update(headers)
            whole = (await post(client)).json()["usage"]["total_tokens"]
            used = whole
            while used < 60:
                assert (await post(client, stream=stream)).status_code == 200
                used += whole
            response = await post(client)
            assert int(response.headers["retry-after"]) == used - 60 + 1
            return response

    response = asyncio.run(story())
    assert response.status_code == 429
    assert "tokens_per_min is 60" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("script", "changes", "status"),
    [
        (says("x"), {}, 200),
        (says("x"), {"model": "other"}, 404),
        (says("x"), {"temperature": "hot"}, 400),
        (says("x"), {"messages": [{"role": "user", "content": "word " * 300}]}, 400),
        (fails(OverloadedError("full")), {}, 429),
        (fails(EngineError("broken")), {}, 500),
        (fails(EngineError("broken"), after=2), {}, None),
    ],
)
def test_a_stream_is_given_back_however_the_request_ends(
    script: Script, changes: dict[str, Any], status: int | None, stream: bool
) -> None:
    async def story() -> None:
        service, headers = guarded(script, streams=1)
        async with http(service) as client:
            client.headers.update(headers)
            for _ in range(2):
                response = await post(client, stream=stream, **changes)
                assert "streams is 1" not in response.text
                assert response.status_code == (status or (200 if stream else 500))

    asyncio.run(story())


WIDE: list[tuple[str, dict[str, Any], int]] = [
    (CHAT, {"messages": BODY["messages"], "n": 3}, 3),
    ("/v1/completions", {"prompt": ["a", "b", "c"]}, 3),
    ("/v1/completions", {"prompt": [[5, 6], [7]], "n": 2}, 4),
    ("/v1/completions", {"prompt": [5, 6, 7]}, 1),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "fields", "streams"), WIDE)
def test_a_request_counts_as_its_prompts_times_its_choices(
    path: str, fields: dict[str, Any], streams: int, stream: bool
) -> None:
    async def answers(limit: int) -> list[tuple[int, str]]:
        service, headers = guarded(says("x"), streams=limit)
        async with http(service) as client:
            client.headers.update(headers)
            asked = [
                await client.post(path, json={"model": "demo", "stream": stream, **body})
                for body in (fields, fields, fields | {"max_tokens": 10**6}, fields)
            ]
            return [(answer.status_code, answer.text) for answer in asked]

    assert [status for status, _ in asyncio.run(answers(streams))] == [200, 200, 400, 200]
    if streams > 1:
        assert {(status, f"makes {streams} streams" in text) for status, text in asyncio.run(answers(streams - 1))} == {
            (400, True)
        }


def test_the_streams_of_a_request_under_way_keep_others_out() -> None:
    async def story() -> None:
        service, headers = guarded(hangs, streams=4)
        router = service.router
        assert isinstance(router, FakeRouter)
        async with http(service) as client:
            client.headers.update(headers)
            body = {"model": "demo", "prompt": ["a", "b", "c"]}
            going = asyncio.create_task(client.post("/v1/completions", json=body))
            await router.hanging.wait()
            refused = await post(client, n=2)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert "3 streams under way and asks for 2" in refused.text
            going.cancel()
            await asyncio.gather(going, return_exceptions=True)
            router.hanging.clear()
            again = asyncio.create_task(post(client, n=4))
            await router.hanging.wait()  # admitted: all places are free again
            again.cancel()
            await asyncio.gather(again, return_exceptions=True)

    asyncio.run(story())


def test_what_a_full_queue_refused_costs_no_tokens() -> None:
    async def story() -> list[int]:
        service, headers = guarded(fails(OverloadedError("full")), tokens_per_min=1)
        async with http(service) as client:
            client.headers.update(headers)
            answers = [await post(client) for _ in range(3)]
        assert all("full" in answer.text for answer in answers)
        return [answer.status_code for answer in answers]

    assert asyncio.run(story()) == [429] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_gives_its_stream_back(stream: bool) -> None:
    async def story() -> None:
        service, headers = guarded(hangs, streams=1)
        app = create_app(service)
        router = service.router
        assert isinstance(router, FakeRouter)
        async with http(service) as client:
            client.headers.update(headers)
            going = asyncio.create_task(_until_gone(app, client, router, stream))
            await router.hanging.wait()
            assert "streams is 1" in (await client.post(CHAT, json=BODY)).text
            await going
            assert len(router.cancelled) == 1
            router.hanging.clear()
            again = asyncio.create_task(client.post(CHAT, json=BODY))
            await router.hanging.wait()  # admitted: the place is free again
            again.cancel()
            await asyncio.gather(again, return_exceptions=True)

    asyncio.run(story())


async def _until_gone(app: Any, client: httpx.AsyncClient, router: FakeRouter, stream: bool) -> None:
    """One request straight into the app, whose client disconnects when the router hangs."""
    request = client.build_request("POST", CHAT, json=BODY | {"stream": stream})
    scope = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "raw_path": CHAT.encode(),
        "query_string": b"",
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "http_version": "1.1",
        "scheme": "http",
    }
    sent = [{"type": "http.request", "body": request.content, "more_body": False}]

    async def receive() -> Any:
        if sent:
            return sent.pop()
        await router.hanging.wait()
        for _ in range(20):  # the other request of the test comes first
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    await app(scope, receive, send)
