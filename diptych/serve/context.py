"""What every endpoint has at hand: the models, the limits, the policy, and how answers and notes are written."""
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from diptych.document import Piece, Text
from diptych.serve import errors
from diptych.serve.insight import Insights
from diptych.serve.metrics import Metrics
from diptych.serve.models import Models, Served
from diptych.serve.pictures import Reader
from diptych.serve.policy import Policy, Side, enforce
from diptych.serve.schema import Strict
from diptych.serve.settings import Settings
from diptych.systems.base import System

M = TypeVar("M", bound=Strict)


class Context:
    def __init__(self, systems: Mapping[str, System], settings: Settings, policy: Policy | None = None,
                 reader: Reader | None = None) -> None:
        self.settings, self.policy = settings, policy
        self.metrics = Metrics()
        self.models = Models(systems, settings, self.metrics)
        self.reader = reader or Reader(settings)
        self.insights = Insights()

    def validated(self, kind: type[M], value: Mapping[str, Any]) -> M:
        """The parameters of a request; ApiError for the first that is wrong."""
        try:
            return kind.model_validate(value)
        except ValidationError as error:
            raise errors.of_validation(error, kind.model_fields, value) from None

    async def allow(self, request: Request, side: Side, pieces: Iterable[Piece], served: Served,
                    *texts: str | None) -> None:
        """Refused if the policy says so."""
        more = [Text(text=text) for text in texts if text]
        await enforce(self.policy, side, [*pieces, *more], model=served.name, key=notes(request).get("key", ""))

    def note(self, request: Request, **facts: Any) -> None:
        """What the log line of a request is to say."""
        notes(request).update(facts)

    def count(self, request: Request, served: Served, prompt: int, produced: int, *, given: int, made: int) -> None:
        """Tokens and pictures of an answer, for the metrics and the log."""
        for direction, tokens, pictures in (("in", prompt, given), ("out", produced, made)):
            self.metrics.tokens.labels(served.name, direction).inc(tokens)
            self.metrics.pictures.labels(served.name, direction).inc(pictures)
        self.note(request, tokens_in=prompt, tokens_out=produced, pictures_in=given, pictures_out=made)

    @staticmethod
    def json(value: Mapping[str, Any], status: int = 200) -> Response:
        return Response(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"), status,
                        media_type="application/json")


def notes(request: Request) -> dict[str, Any]:
    """Facts that travel with a request."""
    return request.scope.setdefault("diptych", {})
