"""An OpenAI-compatible server of trained models, and the page at `/`: Starlette on uvicorn.

Every request is checked against its schema (`schema.py`); what a client can send wrong is answered with a 4xx in
OpenAI's shape. Texts are written by each model's engine (`engine.py`); this module only passes them on, and gives a
text up when its reader has gone. A first Ctrl-C lets the texts under way end while new requests get 503; a second one
ends at once.

    python launch/serve.py --workdir=experiments/tales
    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "Once", "seed": 1}'
"""

import asyncio
import contextlib
import errno
import functools
import hmac
import importlib.metadata
import ipaddress
import json
import logging
import mimetypes
import secrets
import signal
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tale_jax.hardware.backend import start_backend
from tale_jax.inference.sampler import SampleSettings
from tale_jax.planning.numerics import choose_precision
from tale_jax.serve.answers import Answer, Choice
from tale_jax.serve.chat import encode_chat
from tale_jax.serve.engine import Delta, Failure, Job, QueueFull
from tale_jax.serve.inspect import Inspector
from tale_jax.serve.metrics import Metrics
from tale_jax.serve.models import Model, Variant, names_of, open_model
from tale_jax.serve.schema import MAX_CHOICES, SCHEMAS, Invalid, openapi, read
from tale_jax.serve.settings import ServerSettings
from tale_jax.utils.paths import printable_path
from tale_jax.utils.streams import say, write_line

PAGE = Path(__file__).parent / "page"
BODY_SECONDS = 30  # a body takes at most
BACKLOG = 1024  # connections that wait to be accepted
DRAIN_SECONDS = 60  # texts under way get after Ctrl-C
FORCED_SECONDS = 2  # readers get after a second one to take what was written
OPEN_PATHS = ("/health", "/openapi.json")  # and the page: served without a key
TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-store"}
PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "frame-ancestors 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class App:
    """The endpoints over some models; `asgi` is the application."""

    def __init__(
        self,
        models: Sequence[Model],
        *,
        api_keys: Collection[str] = (),
        cors_origins: Sequence[str] = (),
        max_body_bytes: int = 1_000_000,
        only_local_names: bool = False,
    ):
        self.models = {model.name: model for model in models}
        self.inspectors = {m.name: Inspector(m, m.sampler.never_sampled) for m in models}
        self.metrics, self.draining, self.max_body_bytes = Metrics(), False, max_body_bytes
        self._looks = asyncio.Semaphore(2)  # forward passes for /inspect at a time
        self._chats = asyncio.Semaphore(1)  # templates at a time; each has a limit, and who waits holds no thread
        self._page = {path.relative_to(PAGE).as_posix(): path for path in PAGE.rglob("*") if path.is_file()}
        post = functools.partial(functools.partial, self._answer)
        routes = [
            Route("/v1/completions", post(self._completions), methods=["POST"]),
            Route("/v1/chat/completions", post(self._chat), methods=["POST"]),
            Route("/v1/models", post(self._list_models), methods=["GET"]),
            Route("/v1/models/{name:path}", post(self._one_model), methods=["GET"]),
            Route("/tokenize", post(self._tokenize), methods=["POST"]),
            Route("/detokenize", post(self._detokenize), methods=["POST"]),
            Route("/tokenizer_info", post(self._tokenizer_info), methods=["GET"]),
            Route("/inspect/tokens", post(self._tokens), methods=["POST"]),
            Route("/inspect/attention", post(self._attention), methods=["POST"]),
            Route("/inspect/lens", post(self._lens), methods=["POST"]),
            Route("/inspect/judge", post(self._judge), methods=["POST"]),
            Route("/inspect/model", post(self._about), methods=["GET"]),
            Route("/inspect/checkpoints", post(self._checkpoints), methods=["GET"]),
            Route("/inspect/losses", post(self._losses), methods=["GET"]),
            Route("/health", post(self._health), methods=["GET"]),
            Route("/metrics", post(self._metrics), methods=["GET"]),
            Route("/openapi.json", post(self._openapi), methods=["GET"]),
            Route("/{path:path}", self._page_file, methods=["GET"]),
        ]
        middleware = [Middleware(Guard, app=self, api_keys=api_keys, only_local_names=only_local_names)]
        if cors_origins:
            headers, methods = ["authorization", "content-type"], ["GET", "POST"]
            cors = Middleware(
                CORSMiddleware, allow_origins=list(cors_origins), allow_methods=methods, allow_headers=headers
            )
            middleware.insert(0, cors)
        self.asgi = Starlette(
            routes=routes,
            middleware=middleware,
            exception_handlers={HTTPException: _http_error, Exception: _server_error},
        )

    # Texts.

    async def _completions(self, request: Request) -> Response:
        values = await self._values(request)
        model = self._model(values["model"])
        prompt = values["prompt"]
        single = isinstance(prompt, str) or isinstance(prompt[0], int)
        prompts = [prompt] if single else prompt
        read_all = [await self._ids(model, one, f"prompt[{i}]" if not single else "prompt") for i, one in
                    enumerate(prompts)]  # fmt: skip
        texts = [one if isinstance(one, str) else model.tokenizer.decode(one) for one in prompts]
        brings_bos = [not isinstance(one, str) and one[0] == model.tokenizer.bos_id for one in prompts]
        return await self._write(request, model, values, read_all, texts, brings_bos)

    async def _chat(self, request: Request) -> Response:
        values = await self._values(request)
        model = self._model(values["model"])
        if not model.template:
            raise Invalid(
                f"model={model.name} has no chat template (tokenizer/chat_template.jinja); use /v1/completions", "model"
            )
        if values["top_logprobs"] is not None and not values["logprobs"]:
            raise Invalid("top_logprobs must be left out without logprobs=true", "top_logprobs")
        async with self._chats:
            if await request.is_disconnected():
                raise ClientDisconnect
            ids = await asyncio.to_thread(encode_chat, model.template, values["messages"], model.tokenizer)
        self._check_length(model, ids, "messages")
        room = model.context - len(ids)
        limit = values["max_completion_tokens"]
        if limit is not None and values["max_tokens"] is not None:
            raise Invalid("max_tokens must be left out where max_completion_tokens is given", "max_tokens")
        limit = values["max_tokens"] if limit is None else limit
        values["max_tokens"] = max(1, room) if limit is None else limit
        return await self._write(request, model, values, [ids], [""], [False], chat=True)

    async def _write(
        self,
        request: Request,
        model: Model,
        values: dict[str, Any],
        prompts: Sequence[list[int]],
        texts: Sequence[str],
        brings_bos: Sequence[bool],
        chat: bool = False,
    ) -> Response:
        """Submits one job for each choice, and passes on what they write."""
        if values["stream_options"] and not values["stream"]:
            raise Invalid("stream_options must be left out without stream=true", "stream_options")
        if len(prompts) * values["n"] > MAX_CHOICES:
            raise Invalid(f"n={values['n']} times {len(prompts)} prompts must be at most {MAX_CHOICES}", "n")
        variant = await self._variant(model, values)
        seed = secrets.randbits(32) if values["seed"] is None else values["seed"]
        answer = Answer(model, values, chat, {"step": variant.step, "seed": seed}, sum(map(len, prompts)))
        stop = [values["stop"]] if isinstance(values["stop"], str) else values["stop"]
        limits = SampleSettings(
            max_tokens=max(1, values["max_tokens"]),
            temperature=values["temperature"],
            top_k=values["top_k"],
            top_p=values["top_p"],
            min_p=values["min_p"],
            repetition_penalty=values["repetition_penalty"],
            stop=tuple(stop),
        )
        bias = self._bias(model, values)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Any]]()
        jobs, choices = [], []
        for index in range(len(prompts) * values["n"]):
            which, number = divmod(index, values["n"])

            def tell(event: Any, index: int = index) -> None:
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

            choices.append(Choice(answer, index, texts[which]))
            jobs.append(
                Job(
                    ids=prompts[which],
                    limits=limits,
                    on_event=tell,
                    seed=seed,
                    number=number,
                    top=answer.top if answer.top or values["token_details"] else None,
                    score_prompt=answer.scored and not chat and values["echo"],
                    tell_bos=brings_bos[which],
                    max_tokens=values["max_tokens"],
                    presence_penalty=values["presence_penalty"],
                    frequency_penalty=values["frequency_penalty"],
                    logit_bias=bias,
                    weights=variant,
                )
            )
        try:
            model.engine.submit(jobs)
        except QueueFull:
            self.metrics.refused += 1
            raise Invalid("the queue is full; try again", status=429, code="queue_full") from None
        if values["stream"]:
            return _Stream(self._stream(model, answer, jobs, choices, events))
        return await self._whole(request, model, answer, jobs, choices, events)

    async def _events(
        self, model: Model, jobs: Sequence[Job], events: asyncio.Queue[tuple[int, Any]]
    ) -> AsyncGenerator[tuple[int, Any], None]:
        """What the jobs tell, until all have ended; gives them up when nobody listens any more."""
        start_time, left, waiting = time.perf_counter(), len(jobs), True
        try:
            while left:
                index, event = await events.get()
                if isinstance(event, Failure):
                    raise Invalid(event.message, status=500)
                if isinstance(event, Delta) and waiting:
                    self.metrics.first_token.add(time.perf_counter() - start_time)
                    waiting = False
                left -= isinstance(event, Delta) and event.finish_reason is not None
                yield index, event
            self.metrics.duration.add(time.perf_counter() - start_time)
        finally:
            if left:
                model.engine.cancel(jobs)

    async def _whole(
        self,
        request: Request,
        model: Model,
        answer: Answer,
        jobs: Sequence[Job],
        choices: Sequence[Choice],
        events: asyncio.Queue[tuple[int, Any]],
    ) -> Response:
        async def collect() -> None:
            async with contextlib.aclosing(self._events(model, jobs, events)) as told:
                async for index, event in told:
                    choices[index].add(event)

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.create_task(collect()), asyncio.create_task(gone())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            finished = tasks[0].done()
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        if not finished:
            self.metrics.disconnected += 1
            return Response(status_code=400)  # nobody reads it
        if isinstance(results[0], BaseException):
            raise results[0]
        return _json(answer.whole([choice.whole() for choice in choices]))

    async def _stream(
        self,
        model: Model,
        answer: Answer,
        jobs: Sequence[Job],
        choices: Sequence[Choice],
        events: asyncio.Queue[tuple[int, Any]],
    ) -> AsyncGenerator[bytes, None]:
        done = False
        try:
            async with contextlib.aclosing(self._events(model, jobs, events)) as told:
                async for index, event in told:
                    if (choice := choices[index].chunk(event)) is not None:
                        yield _event(answer.chunk([choice]))
            if answer.with_usage:
                yield _event(answer.chunk([], usage=True))
            done = True
            yield b"data: [DONE]\n\n"
        except Invalid as error:
            done = True
            yield _event(_error_json(error.status, str(error), error.field, error.code))
            yield b"data: [DONE]\n\n"
        finally:
            self.metrics.disconnected += not done

    # Other endpoints.

    async def _list_models(self, _: Request) -> Response:
        return _json({"object": "list", "data": [self._model_json(model) for model in self.models.values()]})

    async def _one_model(self, request: Request) -> Response:
        return _json(self._model_json(self._model(request.path_params["name"])))

    def _model_json(self, model: Model) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": 0,
            "owned_by": "tale_jax",
            "step": model.default.step,
            "context": model.context,
            "params": model.num_params,
            "chat": bool(model.template),
        }

    async def _tokenize(self, request: Request) -> Response:
        values = await self._values(request)
        model = self._model(values["model"])
        ids = (await asyncio.to_thread(model.tokenizer.encode, values["prompt"])).tolist()
        ids = [model.tokenizer.bos_id, *ids] if values["add_special_tokens"] else ids
        return _json({"tokens": ids, "count": len(ids), "max_model_len": model.context})

    async def _tokenizer_info(self, request: Request) -> Response:
        """What lm-eval's remote tokenizer asks for. No text stands for a special token, so none has a name here."""
        model = self._inspector(request).model
        ids = {f"{mark}_token_id": getattr(model.tokenizer, f"{mark}_id") for mark in ("bos", "eos", "pad", "unk")}
        names = {f"{mark}_token": None for mark in ("bos", "eos", "pad", "unk")}
        kind = type(model.tokenizer).__name__
        return _json({"tokenizer_class": kind, **names, **ids, "chat_template": model.template or None})

    async def _detokenize(self, request: Request) -> Response:
        values = await self._values(request)
        model = self._model(values["model"])
        self._check_ids(model, values["tokens"], "tokens")
        return _json({"prompt": model.tokenizer.decode(values["tokens"])})

    async def _tokens(self, request: Request) -> Response:
        values, model, ids, variant = await self._text(request)
        settings = values | {"logit_bias": self._bias(model, values)}
        return await self._look(self.inspectors[model.name].tokens, ids, variant, values["top"], settings)

    async def _attention(self, request: Request) -> Response:
        values, model, ids, variant = await self._text(request)
        return await self._look(self.inspectors[model.name].attention, ids, variant, values["layer"], values["head"])

    async def _lens(self, request: Request) -> Response:
        values, model, ids, variant = await self._text(request)
        return await self._look(self.inspectors[model.name].lens, ids, variant, values["top"])

    async def _judge(self, request: Request) -> Response:
        values = await self._values(request)
        return await self._look(self.inspectors[self._model(values["model"]).name].judge, values["text"])

    async def _about(self, request: Request) -> Response:
        return await self._look(self._inspector(request).about)

    async def _checkpoints(self, request: Request) -> Response:
        return await self._look(self._inspector(request).checkpoints)

    async def _losses(self, request: Request) -> Response:
        return await self._look(self._inspector(request).losses)

    async def _health(self, _: Request) -> Response:
        return _json({"status": "draining" if self.draining else "ok"}, 503 if self.draining else 200)

    async def _metrics(self, _: Request) -> Response:
        return Response(self.metrics.text(self.models.values()), media_type="text/plain; version=0.0.4")

    async def _openapi(self, _: Request) -> Response:
        return _json(openapi(importlib.metadata.version("tale_jax")))

    async def _page_file(self, request: Request) -> Response:
        path = self._page.get(request.path_params["path"] or "index.html")
        if path is None:
            is_post = f"/{request.path_params['path']}" in SCHEMAS
            raise HTTPException(405, headers={"allow": "POST"}) if is_post else HTTPException(404)
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return Response(await asyncio.to_thread(path.read_bytes), media_type=kind, headers=PAGE_HEADERS)

    # What they share.

    async def _answer(self, act: Callable[[Request], Awaitable[Response]], request: Request) -> Response:
        try:
            return await act(request)
        except Invalid as error:
            return _error(error.status, str(error), error.field, error.code)
        except ClientDisconnect:
            return Response(status_code=400)

    async def _values(self, request: Request) -> dict[str, Any]:
        """The fields of a request's body."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Invalid("the body must be JSON; send Content-Type: application/json", status=415)
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > self.max_body_bytes:
                        raise Invalid(f"the body must have at most {self.max_body_bytes} bytes", status=413)
        except TimeoutError:
            raise Invalid(f"the body must come within {BODY_SECONDS} seconds", status=408) from None
        try:
            parsed = json.loads(body.decode(), parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else "it cannot be parsed"
            raise Invalid(f"the body must be JSON in UTF-8; {reason}") from None
        path = request.scope["path"]
        assert path in SCHEMAS
        return read(path, parsed)

    async def _text(self, request: Request) -> tuple[dict[str, Any], Model, list[int], Variant]:
        """What the endpoints under /inspect share: the values, model, token ids with BOS, and weights."""
        values = await self._values(request)
        model = self._model(values["model"])
        ids = await self._ids(model, values["prompt"], "prompt")
        return values, model, ids, await self._variant(model, values)

    async def _look(self, act: Callable[..., dict[str, Any]], *arguments: Any) -> Response:
        async with self._looks:
            return _json(await asyncio.to_thread(act, *arguments))

    def _model(self, name: str | None) -> Model:
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name is None:
            raise Invalid(f"model is missing; there is {', '.join(self.models)}", "model")
        if name not in self.models:
            there = ", ".join(self.models)
            raise Invalid(f"there is no such model; there is {there}", "model", 404, "model_not_found")
        return self.models[name]

    def _inspector(self, request: Request) -> Inspector:
        for name in request.query_params:
            if name != "model":
                raise Invalid("only `model` can be asked for here", "query", code="unsupported_parameter")
        return self.inspectors[self._model(request.query_params.get("model")).name]

    async def _ids(self, model: Model, prompt: str | list[int], name: str) -> list[int]:
        """Token ids of a prompt, with BOS. Raises Invalid where they do not fit the context."""
        bos = model.tokenizer.bos_id
        if isinstance(prompt, str):
            if len(prompt) > model.context * model.max_token_bytes:
                raise _too_long(model, f"more than {model.context}", name)
            ids = [bos, *(await asyncio.to_thread(model.tokenizer.encode, prompt)).tolist()]
        else:
            self._check_ids(model, prompt, name)
            ids = prompt if prompt[0] == bos else [bos, *prompt]
        self._check_length(model, ids, name)
        return ids

    def _check_length(self, model: Model, ids: Sequence[int], name: str) -> None:
        if len(ids) > model.context:
            raise _too_long(model, str(len(ids)), name)

    def _check_ids(self, model: Model, ids: Sequence[int], name: str) -> None:
        if ids and max(ids) >= model.tokenizer.vocab_size:
            raise Invalid(f"{name} must hold ids below {model.tokenizer.vocab_size}", name.partition("[")[0])

    def _bias(self, model: Model, values: dict[str, Any]) -> dict[int, float]:
        bias = {int(token): value for token, value in values["logit_bias"].items()}
        self._check_ids(model, list(bias), "logit_bias")
        return bias

    async def _variant(self, model: Model, values: dict[str, Any]) -> Variant:
        """The weights that a request asks for, loaded."""
        step, wanted = values["step"], values["ablate"] or {"heads": [], "layers": []}
        if step is not None and step != model.default.step:
            steps = await asyncio.to_thread(lambda: model.steps)
            if step not in steps:
                raise Invalid(f"step={step} must be one of {', '.join(map(str, steps))}", "step")
        c = model.config.model
        for layer, head in wanted["heads"]:
            if layer >= c.num_layers or head >= c.num_heads:
                raise Invalid(f"ablate.heads must hold [layer, head] below [{c.num_layers}, {c.num_heads}]", "ablate")
        if any(layer >= c.num_layers for layer in wanted["layers"]):
            raise Invalid(f"ablate.layers must be below {c.num_layers}", "ablate")
        heads = tuple(sorted({(layer, head) for layer, head in wanted["heads"]}))
        variant = Variant(model.default.step if step is None else step, heads, tuple(sorted(set(wanted["layers"]))))
        try:
            await asyncio.to_thread(model.params, variant)
        except ValueError as error:
            raise Invalid(str(error), "step") from None
        return variant


class Guard:
    """Before any endpoint: counts, refuses what has no key or no business here, and anything while the server ends."""

    def __init__(self, inner: ASGIApp, app: App, api_keys: Collection[str], only_local_names: bool):
        self.inner, self.app, self.only_local_names = inner, app, only_local_names
        self.keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.inner(scope, receive, send)
        path, started = scope["path"], False

        async def counted(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start" and not started:
                started = True
                self.app.metrics.count(scope["path"], message["status"])
            await send(message)

        headers = {name.lower(): value for name, value in scope["headers"]}
        refusal = self._refusal(path, headers)
        self.app.metrics.open += 1
        try:
            await (refusal or self.inner)(scope, receive, counted)
        except asyncio.CancelledError:
            if not self.app.draining:
                raise
        finally:
            self.app.metrics.open -= 1

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> Response | None:
        if self.only_local_names and not _is_local(headers.get(b"host", b"").decode("latin-1")):
            return _error(403, "call this server as localhost or 127.0.0.1", code="host_not_allowed")
        is_api = path.startswith(("/v1", "/inspect", "/tokenize", "/detokenize", "/metrics"))
        if self.keys and is_api:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            given = [hmac.compare_digest(key.strip(), known) for known in self.keys]
            if scheme.lower() != b"bearer" or not any(given):
                return _error(401, "a valid key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        if self.app.draining and is_api and path != "/metrics":
            return _error(503, "the server ends; try again later", code="draining")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.app.max_body_bytes:
            return _error(413, f"the body must have at most {self.app.max_body_bytes} bytes")
        return None


class _Stream(StreamingResponse):
    """Server-sent events, whose source is closed when the reader has gone."""

    def __init__(self, events: AsyncGenerator[bytes, None]):
        super().__init__(events, media_type="text/event-stream", headers=HEADERS | {"x-accel-buffering": "no"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


def _json(content: Any, status: int = 200) -> Response:
    return JSONResponse(content, status, headers=HEADERS)


def _event(content: Any) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _error_json(status: int, message: str, field: str | None, code: str | None) -> dict[str, Any]:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def _error(status: int, message: str, field: str | None = None, code: str | None = None) -> Response:
    response = _json(_error_json(status, message, field, code), status)
    if status == 401:
        response.headers["www-authenticate"] = "Bearer"
    if status in (429, 503):
        response.headers["retry-after"] = "1"
    return response


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: "there is no such address", 405: "this address takes another method"}
    response = _error(error.status_code, message.get(error.status_code, error.detail))
    response.headers.update(error.headers or {})
    return response


async def _server_error(_: Request, error: Exception) -> Response:
    del error  # its traceback goes to the log, and to nobody else
    return _error(500, "the server made a mistake")


def _too_long(model: Model, tokens: str, name: str) -> Invalid:
    message = f"{name} of {tokens} tokens, BOS included, must fit the context of {model.context}; shorten it"
    return Invalid(message, name.partition("[")[0], 413, "context_length_exceeded")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _is_local(host: str) -> bool:
    """Whether a Host header is a name of this machine to itself: a page from elsewhere that had its name point here
    would come with that name."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    name = name.strip("[]").lower()
    return name == "localhost" or _is_loopback(name)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# The process.


class _Uvicorn(uvicorn.Server):
    """Leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield


def serve(workdirs: Sequence[Path], settings: ServerSettings) -> None:
    """Serves the models of some workdirs until Ctrl-C, or SIGTERM.

    Raises ValueError, in one line, for a workdir without a model, a port that is taken, or a file without a key.
    """
    keys = _read_keys(settings.api_key_file)
    listener = _listen(settings.host, settings.port)
    with listener:
        backend = start_backend("auto")
        dtype = choose_precision(backend, settings.precision)[0]
        options = {name: getattr(settings, name) for name in ("weights", "rows", "block_rows", "max_queue")}
        models = [
            open_model(folder, name, backend, dtype=dtype, **options)
            for folder, name in zip(workdirs, names_of(workdirs), strict=True)
        ]
        asyncio.run(_serve(models, keys, settings, listener))


async def _serve(
    models: Sequence[Model], keys: Collection[str], settings: ServerSettings, listener: socket.socket
) -> None:
    app = App(
        models,
        api_keys=keys,
        cors_origins=settings.cors_origins,
        max_body_bytes=settings.max_body_bytes,
        only_local_names=_is_loopback(settings.host) and not keys,
    )
    config = uvicorn.Config(
        app.asgi,
        log_level="warning",
        access_log=False,
        lifespan="off",
        loop="asyncio",
        http="h11",
        ws="none",
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=2,
    )
    server, ending = _Uvicorn(config), asyncio.Event()

    async def end_now() -> None:
        """Texts under way end with an error, rather than cancelled by uvicorn, which logs a traceback."""
        for model in models:
            await asyncio.to_thread(model.engine.stop)
        await _rest(app, FORCED_SECONDS)
        server.should_exit = server.force_exit = True

    forced: list[asyncio.Task[None]] = []

    def end() -> None:
        if app.draining and not forced:
            forced.append(asyncio.create_task(end_now()))
        app.draining = True
        ending.set()

    call_on_signals(end)
    for model in models:
        model.engine.start()
    drain = asyncio.create_task(_drain(app, server, ending))
    host, port = listener.getsockname()[:2]
    names = ", ".join(f"{model.name} (step {model.default.step:,})" for model in models)
    shown = f"[{host}]" if ":" in host else host
    listener.listen(BACKLOG)  # before the line that says so
    say(f"serves {names} at http://{shown}:{port}; Ctrl-C ends it")
    try:
        await server.serve(sockets=[listener])
    finally:
        drain.cancel()
        for model in models:
            await asyncio.to_thread(model.engine.stop)


def call_on_signals(call: Callable[[], None]) -> None:
    """Lets the running event loop call `call` at SIGINT and SIGTERM, however much other threads ask of it.

    asyncio passes a signal on by a byte in the socket that also wakes the loop for other threads; where hundreds of
    their bytes wait there is no room for it, and the signal is lost. So the call comes from Python's own handler.
    """
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: None)  # wakes the loop where another thread gets the signal
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(call))
    signal.set_wakeup_fd(signal.set_wakeup_fd(-1), warn_on_full_buffer=False)


async def _drain(app: App, server: uvicorn.Server, ending: asyncio.Event) -> None:
    """After the first signal: waits until the texts under way have ended, then lets the server end."""
    await ending.wait()
    write_line("ends when the texts under way have ended; Ctrl-C again ends at once")
    await _rest(app, DRAIN_SECONDS)
    server.should_exit = True


async def _rest(app: App, seconds: float) -> None:
    """Waits until no request is under way, but no longer than so many seconds."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while app.metrics.open or not all(model.engine.idle for model in app.models.values()):
                await asyncio.sleep(0.05)


def _read_keys(path: Path | None) -> list[str]:
    if path is None:
        return []
    lines = path.read_bytes().decode(errors="replace").splitlines()
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ValueError(f"--api_key_file={printable_path(path)} must hold a key, one a line; write one into it")
    if odd := [key for key in keys if not (key.isascii() and key.isprintable() and " " not in key)]:
        raise ValueError(
            f"--api_key_file={printable_path(path)} must hold keys of printable ASCII without spaces, and line "
            f"{1 + keys.index(odd[0])} is none; write another, as `openssl rand -hex 16` makes one"
        )
    return keys


def _listen(host: str, port: int) -> socket.socket:
    listener = None
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        reason = error.strerror or str(error)
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise ValueError(
                f"--host={host} must be a name or an address of this machine ({reason}); try --host=127.0.0.1"
            ) from None
        raise ValueError(f"--host={host} --port={port} must be free to listen on ({reason}); try --port=0") from None
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    return listener
