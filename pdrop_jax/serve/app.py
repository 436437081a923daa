"""The HTTP routes."""

import asyncio
import contextlib
import hmac
import pathlib
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdrop_jax.errors import UserError, printable
from pdrop_jax.generation.continuous import EngineFull
from pdrop_jax.generation.requests import Completion
from pdrop_jax.serve.details import details
from pdrop_jax.serve.protocol import ChatRequest, read_request
from pdrop_jax.serve.responses import ApiError, Responses, event
from pdrop_jax.serve.service import Asked, Service

PAGE = pathlib.Path(__file__).parent / "page"  # static files, served at /
BODY_BYTES = 2**26  # of a request
BODY_SECONDS = 60  # to receive it


def create_app(service: Service, api_key: str | None = None, body_bytes: int = BODY_BYTES) -> FastAPI:
    """The application.

    Args:
      api_key: what clients have to send as ``Authorization: Bearer KEY``; None lets all in.
      body_bytes: largest request.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await anyio.to_thread.run_sync(service.close)

    app = FastAPI(title="pdrop-jax", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    answer_errors(app)
    app.add_middleware(Counted, service=service)

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            raise ApiError(401, "the API key is missing or wrong", "authentication_error", "invalid_api_key")

    v1 = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])

    @app.get("/health")
    async def health() -> Response:
        state = service.state
        if state == "ready" and any(engine.failed for engine in service.engines.values()):
            state = "failed"
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @v1.get("/models")
    async def models() -> dict[str, Any]:
        budgets = {name: model.config.schedule.to_json() for name, model in service.models.items()}
        layers = service.model.config.text.num_layers
        pdrop = {"default": service.default_budget, "num_layers": layers, "budgets": budgets}
        about = {"id": service.name, "object": "model", "created": 0, "owned_by": "pdrop-jax", "pdrop": pdrop}
        return {"object": "list", "data": [about]}

    @v1.post("/chat/completions")
    async def chat(request: Request) -> Response:
        check_ready(service)
        body = await read_body(request, body_bytes)
        return await while_connected(request, respond(service, body))

    @app.post("/load_model")
    async def load_model() -> Response:
        """transformers' chat command asks for this before its first question, without a key."""
        check_ready(service)
        return PlainTextResponse(event({"status": "ready", "cached": True}), media_type="text/event-stream")

    app.include_router(v1)
    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


def check_ready(service: Service) -> None:
    if service.state != "ready":
        kind = "service_unavailable"
        raise ApiError(503, f"the server is {service.state}: try again later", "server_error", kind, retry_after=5)


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request that says that it is JSON. Raises ApiError if it is too large or does not come."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body has to be JSON: Content-Type: application/json", "invalid_request_error")
    too_large = ApiError(
        413, f"the request has more than {limit:,} bytes: send smaller images", "invalid_request_error"
    )
    if request.headers.get("content-length", "0").rjust(20, "0") > str(limit).rjust(20, "0"):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise too_large
    except ClientDisconnect:
        raise _client_gone() from None
    except TimeoutError:
        raise ApiError(408, f"the request did not come within {BODY_SECONDS} s", "invalid_request_error") from None
    return bytes(body)


def _client_gone() -> ApiError:
    """For the metrics: nobody reads it. A single instance would collect tracebacks, and with them requests."""
    return ApiError(499, "the client went away", "invalid_request_error")


async def while_connected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The result of ``work``, which is cancelled if the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _client_gone()
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()


async def respond(service: Service, body: bytes) -> Response:
    request = await anyio.to_thread.run_sync(read_request, body)
    if request.model not in (None, service.name):
        found = f"there is no model {request.model[:80]!r}: this server has {service.name!r}"
        raise ApiError(404, found, "invalid_request_error", "model_not_found")
    asked = await service.ask(request)
    responses = Responses(service.name, service.token_bytes)
    if request.stream:
        return Stream(asked, events(service, request, asked, responses))
    try:
        answers = await asked.answers()
        check_complete(answers)
        extra = {"pdrop": await detailed(service, asked)} if request.pdrop_details else {}
    finally:
        asked.close()
    return JSONResponse(responses.whole(answers, extra))


async def events(service: Service, request: ChatRequest, asked: Asked, responses: Responses) -> AsyncIterator[str]:
    """The server-sent events of a streamed response."""
    sent = [0] * len(asked.handles)
    try:
        for number in range(len(asked.handles)):
            yield responses.chunk(number, {"role": "assistant", "content": ""})
        async for number, piece in asked.pieces():
            handle = asked.handles[number]
            reason, extra = None, {}
            if piece is None:
                check_complete([handle.result(0)])
                reason = handle.result(0).finish_reason
                if request.pdrop_details and number == 0:
                    extra = {"pdrop": await detailed(service, asked)}
            logprobs = handle.logprobs[sent[number] :]
            sent[number] += len(logprobs)
            yield responses.chunk(number, {"content": piece} if piece else {}, logprobs, reason, **extra)
        if request.stream_options and request.stream_options.include_usage:
            yield responses.last([handle.result(0) for handle in asked.handles])
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield event(as_api_error(error).body)


async def detailed(service: Service, asked: Asked) -> dict[str, Any]:
    model, engine = service.models[asked.budget], service.engines[asked.budget]
    answer = asked.handles[0].result(0)
    return await anyio.to_thread.run_sync(details, asked.budget, model, engine, asked.media, answer)


class Stream(StreamingResponse):
    """Cancels what it streams when it ends, also where the client went away before it began."""

    def __init__(self, asked: Asked, content: AsyncIterator[str]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._asked = asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._asked.close()


class Counted:
    """Middleware that counts responses, and the requests that are being answered."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self._service.metrics.responded(path, message["status"])
            await send(message)

        self._service.active += 1
        try:
            await self._app(scope, receive, counted)
        finally:
            self._service.active -= 1


def check_complete(answers: Sequence[Completion]) -> None:
    """Raises ApiError if the server has cancelled an answer because it is stopped at once."""
    if any(answer.finish_reason == "cancelled" for answer in answers):
        raise ApiError(503, "the server was stopped", "server_error", "service_unavailable")


def as_api_error(error: Exception) -> ApiError:
    match error:
        case ApiError():
            return error
        case EngineFull():
            return ApiError(429, str(error), "rate_limit_error", "rate_limit_exceeded", retry_after=1)
        case UserError():
            return ApiError(400, printable(error.args[0]), "invalid_request_error")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), "invalid_request_error")
    return ApiError(500, "the server made an error, which its log describes", "server_error")


def answer_errors(app: FastAPI) -> None:
    """Every error becomes a response in OpenAI's form with one line."""

    async def respond(request: Request, error: Exception) -> Response:
        found = as_api_error(error)
        headers = {} if found.retry_after is None else {"Retry-After": str(found.retry_after)}
        return JSONResponse(found.body, found.status, headers=headers)

    for kind in (ApiError, UserError, HTTPException, Exception):
        app.add_exception_handler(kind, respond)
