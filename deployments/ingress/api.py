"""The HTTP API: routes, and the way of one request through authentication, checks, generation and answer.

`create_app(service)` is all a Serve replica or a test needs. Every error leaves here as an OpenAI error object; every
accepted request ends its router streams, however it ends. Knows no Ray.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from fastapi import FastAPI
from openai.types import Model
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from cluster.errors import RequestError
from deployments.generation import GenerationRequest, SamplingParams
from deployments.ingress.choices import Delta
from deployments.ingress.dashboard import page
from deployments.ingress.deadlines import Deadline
from deployments.ingress.disconnect import while_connected
from deployments.ingress.errors import ClientGoneError, error_object, error_response, json_response
from deployments.ingress.experts_used import Unsaid, asking, with_experts
from deployments.ingress.generate import Generation
from deployments.ingress.limits import Lease
from deployments.ingress.live import LONGEST_S, Live
from deployments.ingress.logged import Label, LoggedGeneration
from deployments.ingress.metering import CHAT, COMPLETIONS, Metered
from deployments.ingress.openapi import document
from deployments.ingress.parsing import MAX_SESSION_CHARS, SESSION_HEADER, check_headers, parse_body, read_body
from deployments.ingress.prompts import chat_prompt, completion_prompts, count_prompts
from deployments.ingress.request_ids import RequestIds, request_id
from deployments.ingress.responses import Answer, ChatAnswer, TextAnswer, join
from deployments.ingress.schemas import ChatBody, CompletionBody
from deployments.ingress.service import Service
from deployments.ingress.shared_health import SharedHealth
from deployments.ingress.sse import DONE, EventStream, event
from deployments.ingress.tracing import tracing
from deployments.ingress.validation import check_body, check_model, completion_budget, draw_seed, sampling_params

LAST_WORDS_S = 1.0
"""For a client to take the error that ends its stream, before it is cut off."""

Asked = TypeVar("Asked", ChatBody, CompletionBody)
Handler = Callable[[Request], Awaitable[Response]]


def create_app(service: Service, *, proxied: bool = False) -> FastAPI:
    """The ASGI application over `service`. proxied: behind Serve's proxy, which puts the request's id on answers."""
    api = _Api(service)
    routes: list[BaseRoute] = [
        Route(CHAT, _answering(api.chat, service.metering.counting(CHAT)), methods=["POST"]),
        Route(COMPLETIONS, _answering(api.completions, service.metering.counting(COMPLETIONS)), methods=["POST"]),
        Route("/v1/models", _answering(api.models), methods=["GET"]),
        Route("/v1/models/{name:path}", _answering(api.model), methods=["GET"]),
        Route("/v1/cluster", _answering(api.cluster), methods=["GET"]),
        Route("/v1/cluster/loads", _answering(api.loads), methods=["GET"]),
        Route("/openapi.json", _answering(api.openapi), methods=["GET"]),
        Route("/health", _answering(api.health), methods=["GET"]),
        Route("/dashboard", _answering(page), methods=["GET"]),
        # Before the files: it is none.
        Route("/dashboard/events", _answering(api.events), methods=["GET"]),
        Route("/dashboard/{file}", _answering(page), methods=["GET"]),
    ]
    # Our own description instead of FastAPI's, and no interactive pages: they load scripts from other hosts.
    app = FastAPI(title="ExpertScale", routes=routes, openapi_url=None, redirect_slashes=False)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(RequestIds, tell=not proxied)
    return app


class _Api:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._live = Live(service.cluster, leaving=service.leaving)
        self._health = SharedHealth(service.cluster)

    async def chat(self, request: Request) -> Response:
        with self._admit(request) as lease:
            body, sampling, deadline = await self._accept(request, ChatBody)
            lease.widen(body.n or 1)
            prompts = [("messages", await chat_prompt(body, self._service))]
            return await self._generate(request, body, sampling, prompts, deadline, lease)

    async def completions(self, request: Request) -> Response:
        with self._admit(request) as lease:
            body, sampling, deadline = await self._accept(request, CompletionBody)
            lease.widen(count_prompts(body) * (body.n or 1))
            prompts = await completion_prompts(body, self._service)
            return await self._generate(request, body, sampling, prompts, deadline, lease)

    async def models(self, request: Request) -> Response:
        self._service.auth.check_api(request.headers.get("authorization"))
        return json_response({"object": "list", "data": [self._model().model_dump(exclude_unset=True)]})

    async def model(self, request: Request) -> Response:
        self._service.auth.check_api(request.headers.get("authorization"))
        check_model(request.path_params["name"], self._service.model)
        return json_response(self._model().model_dump(exclude_unset=True))

    async def cluster(self, request: Request) -> Response:
        self._service.auth.check_admin(request.headers.get("authorization"))
        return json_response(await self._service.cluster.snapshot())

    async def loads(self, request: Request) -> Response:
        self._service.auth.check_admin(request.headers.get("authorization"))
        return json_response(await self._service.cluster.loads())

    async def events(self, request: Request) -> Response:
        self._service.auth.check_admin(request.headers.get("authorization"))
        self._live.enter()
        until_s = asyncio.get_running_loop().time() + LONGEST_S + LAST_WORDS_S
        return EventStream(self._live.events(), self._live.leave, {}, until_s)

    async def openapi(self, request: Request) -> Response:
        self._service.auth.check_api(request.headers.get("authorization"))
        return json_response(document())

    async def health(self, request: Request) -> Response:
        if (health := await self._health()) is None:
            return json_response({"status": "unavailable", "missing": ["directory"]}, 503)
        status = "ok" if health.ready else "unavailable"
        body: dict[str, object] = {"status": status, "missing": list(health.missing)}
        if health.degraded:
            body["degraded"] = list(health.degraded)
        # Reasons name files and nodes: for those who may see the cluster.
        if self._service.auth.is_admin(request.headers.get("authorization")):
            body["reasons"] = {**health.reasons, **health.degraded}
        return json_response(body, 200 if health.ready else 503)

    def _model(self) -> Model:
        model = self._service.model
        return Model(id=model.name, object="model", created=model.created, owned_by="expertscale")

    def _admit(self, request: Request) -> Lease:
        """Before anything is read: is there a key, and has it used up one of its limits?"""
        return self._service.limiter.admit(self._service.auth.check_api(request.headers.get("authorization")))

    async def _accept(self, request: Request, kind: type[Asked]) -> tuple[Asked, SamplingParams, Deadline]:
        """Everything that can be refused before the cost of tokenising. The budget of tokens comes after it."""
        service = self._service
        deadline = Deadline(request.headers, service.request_timeout_s)
        patience_s = min(service.body_timeout_s, deadline.left_s())
        body = parse_body(await read_body(request.stream(), request.headers, service.max_body_bytes, patience_s), kind)
        deadline.shorten(body.timeout)
        check_body(body, service.model)
        return body, sampling_params(body, service.model, max_tokens=1), deadline

    async def _generate(
        self,
        request: Request,
        body: ChatBody | CompletionBody,
        sampling: SamplingParams,
        prompts: Sequence[tuple[str, tuple[int, ...]]],
        deadline: Deadline,
        lease: Lease,
    ) -> Response:
        service = self._service
        metered: Metered = request.state.metered
        chat = isinstance(body, ChatBody)
        id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        usage = bool(body.stream_options and body.stream_options.include_usage)
        answer = (ChatAnswer if chat else TextAnswer)(
            id, int(time.time()), service.model, service.tokenizer, logprobs=body.alternatives is not None, usage=usage
        )
        traced = tracing(service.tracer, request.headers, model=service.model.name, id=id, chat=chat)
        label = Label(CHAT if chat else COMPLETIONS, id, request_id(request.headers), bool(body.stream))
        generation = traced(
            service.router,
            asking(request.headers, _requests(label, body, sampling, prompts, service, deadline)),
            session_id=_session_id(request, body),
            tokenizer=service.tokenizer,
            stops=body.stop or (),
            deadline=deadline,
            label=label,
            heard=metered.heard,
        )
        streaming = False
        try:
            if not body.stream:
                deltas = [join(parts) for parts in await while_connected(request.receive, generation.collect())]
                answer.by(generation.digest)
                whole = with_experts(answer.complete(deltas, generation.usage()), deltas)
                content = whole.model_dump_json(exclude_unset=True)
                generation.done()
                return Response(content, media_type="application/json")
            # The status is sent with the first token: what fails before it fails with a status of its own.
            first = await while_connected(request.receive, generation.next())
            streaming = True
            lease.keep()
            metered.keep()
            events = _events(generation, first, answer, usage, label.request_id, metered)
            end = partial(_end, generation, lease, metered)
            return EventStream(events, end, {}, deadline.gone_s + LAST_WORDS_S)
        except Exception as error:
            generation.failed(error)
            raise
        finally:
            if not streaming:
                await _end(generation, lease, metered)


def _requests(
    label: Label,
    body: ChatBody | CompletionBody,
    sampling: SamplingParams,
    prompts: Sequence[tuple[str, tuple[int, ...]]],
    service: Service,
    deadline: Deadline,
) -> list[GenerationRequest]:
    """One request for the routers a prompt. A seed the client gave is the same for all; drawn ones differ, or equal
    prompts would get equal answers."""
    return [
        GenerationRequest(
            request_id=f"{label.id}-{i}",
            tokens=tokens,
            sampling=replace(
                sampling,
                max_tokens=completion_budget(body, len(tokens), param, service.model),
                seed=draw_seed() if body.seed is None else body.seed,
            ),
            prompt_tokens=len(tokens),
            timeout_s=deadline.left_s(),
            # The first one speaks for all: else more prompts than a router has places would never be let in.
            accepted=i > 0,
            x_request_id=label.request_id,
        )
        for i, (param, tokens) in enumerate(prompts)
    ]


async def _end(generation: Generation, lease: Lease, metered: Metered) -> None:
    """Whichever end it is: the routers stop, the key pays for what was used, and it is counted."""
    try:
        await generation.aclose()
    finally:
        usage = generation.usage()
        lease.ended(usage.prompt_tokens + usage.completion_tokens)
        metered.ended(generation.choices)


async def _events(
    generation: LoggedGeneration, delta: Delta | None, answer: Answer, usage: bool, request_id: str, metered: Metered
) -> AsyncGenerator[bytes, None]:
    """The body of a streamed answer, beginning with the delta that was waited for."""
    unsaid = Unsaid()
    try:
        answer.by(generation.digest)
        for chunk in answer.opening(len(generation.choices)):
            yield event(chunk)
        while delta is not None:
            for chunk in unsaid.told(delta, answer.chunks(delta)):
                yield event(chunk)
            delta = await generation.next()
        if usage:
            yield event(answer.usage_chunk(generation.usage()))
    except ClientGoneError:
        raise  # nobody is there to be told
    except Exception as error:  # the status is long sent: the error becomes the last event
        metered.failed(error)
        generation.failed(error)
        yield event(error_object(error, request_id))
        return
    metered.done()
    generation.done()
    yield DONE


def _session_id(request: Request, body: ChatBody | CompletionBody) -> str | None:
    session_id = request.headers.get(SESSION_HEADER) or body.user
    if session_id and len(session_id) > MAX_SESSION_CHARS:
        message = f"The header {SESSION_HEADER} is longer than {MAX_SESSION_CHARS} characters."
        raise RequestError(message, SESSION_HEADER, "invalid_value")
    return session_id or None


def _answering(handler: Handler, counting: Callable[[Handler], Handler] = lambda handler: handler) -> Handler:
    """Every error becomes a response here. (Starlette re-raises what reaches its own outermost handler.)

    counting: wraps all that can fail, to know how it ends.
    """

    @counting
    async def checked(request: Request) -> Response:
        check_headers(request.headers.raw)
        return await handler(request)

    async def answer(request: Request) -> Response:
        try:
            return await checked(request)
        except (ClientGoneError, ClientDisconnect):
            return Response(status_code=499)
        except Exception as error:
            return error_response(error, request_id(request.headers))

    return answer


async def _http_error(request: Request, error: Exception) -> Response:
    return error_response(error, request_id(request.headers))
