"""The application: endpoints, what stands before them, and the specification that they are served with.

    app = create_app({"mini": system}, Settings())

`app` is FastAPI's; `app.state.context` holds the rest. More routes (a page, say) are added to it as to any other.
"""
import asyncio
import copy
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

import diptych
from diptych.serve import chat, drawing, errors, logs, schema
from diptych.serve.auth import Keys
from diptych.serve.context import Context, notes
from diptych.serve.errors import ApiError
from diptych.serve.gate import Access, Gate, answer_error
from diptych.serve.pictures import Reader
from diptych.serve.policy import Policy
from diptych.serve.settings import Settings
from diptych.serve.studio import add_studio
from diptych.systems.base import System

REFUSALS = {400: "What was asked cannot be done", 401: "No key, or an unknown one", 403: "Another site, or a name that "
            "is not this server's", 404: "No such model", 408: "The body took too long", 413: "The body is too large",
            415: "Another content type", 429: "Too many requests; see Retry-After", 500: "A number for the operator",
            503: "Shutting down, or too many bodies"}


def create_app(systems: Mapping[str, System], settings: Settings | None = None, *, keys: Keys | None = None,
               policy: Policy | None = None, reader: Reader | None = None) -> FastAPI:
    """The server of some models. It starts their engines when it starts, and lets them finish when it stops."""
    settings = settings or Settings()
    context = Context(systems, settings, policy, reader)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(context.models.start)  # replicas take a while
        yield
        context.models.close(cancel=True)  # connections have been waited for: what still runs has no reader

    guards = [Middleware(Gate, context=context), *_cors(settings), Middleware(Access, context=context, keys=keys)]  # type: ignore[arg-type]
    app = FastAPI(title="Diptych", version=diptych.__version__, docs_url=None, redoc_url=None, lifespan=lifespan,
                  redirect_slashes=False, middleware=guards,
                  summary="Models that see and draw, in the dialect of the OpenAI API")
    app.state.context = context
    _handle_errors(app)
    _routes(app, context)
    if settings.studio:
        add_studio(app)
    app.openapi = lambda: specification(app, keyed=keys is not None)  # type: ignore[method-assign]
    return app


def _cors(settings: Settings) -> list[Middleware]:
    """Closed unless origins are named."""
    if not settings.cors:
        return []
    return [Middleware(CORSMiddleware, allow_origins=list(settings.cors), allow_methods=["GET", "POST"],
                       allow_headers=["authorization", "content-type", "x-request-id"],
                       expose_headers=["x-request-id", "retry-after"])]


def _routes(app: FastAPI, context: Context) -> None:
    refusals: dict[int | str, dict[str, Any]] = {
        code: {"description": told, **_content("Error")} for code, told in REFUSALS.items()}
    few = {code: refusals[code] for code in (400, 401, 403, 413, 429, 500, 503)}

    def answers(name: str, streamed: bool = True) -> dict[int | str, dict[str, Any]]:
        good = {"description": "The answer; with stream, server-sent events", **_content(name)}
        if streamed:
            good["content"]["text/event-stream"] = {"schema": {"type": "string"}}
        return {200: good, **refusals}

    @app.get("/health", responses={200: {"description": "It serves", **_content("Health")}, **few})
    async def health() -> Response:
        """Whether the server is there. Needs no key."""
        return context.json({"status": "ok", "version": diptych.__version__})

    @app.get("/v1/models", responses={200: {"description": "All models", **_content("ModelList")}, **few})
    async def models() -> Response:
        """The models by name, the default one first."""
        return context.json({"object": "list", "data": [m.card() for m in context.models.named.values()]})

    @app.get("/v1/models/{name}", responses={200: {"description": "One model", **_content("ModelCard")}, **few,
                                             404: refusals[404]})
    async def model(name: str) -> Response:
        """One model."""
        return context.json(context.models.find(name).card())

    @app.get("/v1/models/{name}/attention/{task}", responses={
        200: {"description": "Who attends to whom", **_content("Attention")}, **few, 404: refusals[404]})
    async def attention(name: str, task: str) -> Response:
        """The attention mask of a document of this task, in the model's own sequence."""
        return context.json(await context.insights.attention(context.models.find(name), task))

    @app.get("/v1/models/{name}/alignment", responses={
        200: {"description": "Agreement of pictures and words", **_content("Alignment")}, **few, 404: refusals[404]})
    async def alignment(name: str) -> Response:
        """How much pictures and words agree, layer by layer. Made once, which takes a while."""
        return context.json(await context.insights.alignment(context.models.find(name)))

    @app.get("/metrics", responses={200: {"description": "Prometheus text", "content": {
        "text/plain": {"schema": {"type": "string"}}}}, **few})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(context.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/v1/chat/completions", responses=answers("ChatAnswer"), openapi_extra=_body("ChatRequest"))
    async def complete(request: Request) -> Response:
        """Continue a conversation, in words, pictures or boxes."""
        return await chat.complete(context, request)

    @app.post("/v1/images/generations", responses=answers("PictureAnswer"), openapi_extra=_body("GenerationRequest"))
    async def generate(request: Request) -> Response:
        """Draw from words, boxes or both."""
        return await drawing.generate(context, request)

    @app.post("/v1/images/edits", responses=answers("PictureAnswer"),
              openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {
                  "schema": {"$ref": "#/components/schemas/EditForm"}}}}})
    async def edit(request: Request) -> Response:
        """Change a picture as words say, where a mask allows it."""
        return await drawing.edit(context, request)


def _handle_errors(app: FastAPI) -> None:
    async def told(request: Request, error: Exception) -> Response:
        known = errors.public(error) or logs.unexpected(error)
        if known.status_code == 404 and isinstance(error, HTTPException) and not isinstance(error, ApiError):
            known = ApiError(404, "expected a path of this server, got another; fix: GET /openapi.json lists them")
        if known.status_code == 405:
            known = ApiError(405, f"expected another method, got {request.method[:20]}", headers=known.headers)
        notes(request)["error"] = known
        return answer_error(known)

    app.add_exception_handler(HTTPException, told)
    app.add_exception_handler(ValueError, told)


# -- the specification ------------------------------------------------------------------------------------------------

def _content(name: str) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}


def _body(name: str) -> dict[str, Any]:
    return {"requestBody": {"required": True, **_content(name)}}


def specification(app: FastAPI, *, keyed: bool) -> dict[str, Any]:
    """OpenAPI 3.1, with the schemas that requests are really checked against."""
    if app.openapi_schema:
        return app.openapi_schema
    base = FastAPI.openapi(app)
    kinds: list[type[BaseModel]] = [
        schema.ChatRequest, schema.GenerationRequest, schema.EditRequest, schema.ChatAnswer, schema.PictureAnswer,
        schema.ModelList, schema.ModelCard, schema.Attention, schema.Alignment, schema.Error, schema.Health]
    _, made = models_json_schema([(k, "validation") for k in kinds], ref_template="#/components/schemas/{model}")
    schemas = made["$defs"]
    form = copy.deepcopy(schemas["EditRequest"])
    file = {"type": "string", "format": "binary"}
    form["properties"] |= {"image": {"type": "array", "items": file, "minItems": 1, "maxItems": 16}, "mask": file}
    form["required"] = [*form["required"], "image"]
    schemas["EditForm"] = form
    parts = base.setdefault("components", {})
    parts["schemas"] = {**schemas}
    if keyed:
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        base["security"] = [{"key": []}]
    app.openapi_schema = base
    return base
