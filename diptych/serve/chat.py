"""POST /v1/chat/completions: conversations with pictures in both directions."""
import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from diptych.cli.draw import layout_json
from diptych.document import Boxes, Document, Image, Piece, Text
from diptych.serve import requests
from diptych.serve.context import Context
from diptych.serve.limits import read_json
from diptych.serve.models import Answers, PromptTokens, Served
from diptych.serve.pictures import encoded
from diptych.serve.policy import Refused
from diptych.serve.requests import Asked
from diptych.serve.schema import ChatRequest
from diptych.serve.stream import QUIET, EventStream, event, while_there
from diptych.systems.base import Event

BETWEEN = "\n\n"  # texts of one answer where they become one string


async def complete(context: Context, request: Request) -> Response:
    told = context.validated(ChatRequest, await read_json(request))
    served = context.models.find(told.model)
    context.note(request, model=served.name, kind="chat", answers=told.n or 1, stream=bool(told.stream))
    asked = await requests.of_chat(told, served, context.reader.budget(served.system.config))
    prompt = await asyncio.to_thread(served.check_length, asked.document)
    await context.allow(request, "prompt", [p for p in asked.document if not p.target], served, told.negative_prompt)
    answers = served.submit(asked.asks)
    talk = Talk(context, request, told, served, asked, prompt, answers)
    if told.stream:
        return EventStream(talk.chunks(), answers.cancel, context.settings.send_seconds)
    made = await while_there(request, answers.documents(), answers.cancel)
    return context.json(await talk.whole(made))


class Talk:
    """One request and how its answers are put."""

    def __init__(self, context: Context, request: Request, told: ChatRequest, served: Served, asked: Asked,
                 prompt: PromptTokens, answers: Answers) -> None:
        self.context, self.request, self.told, self.served = context, request, told, served
        self.asked, self.prompt, self.answers = asked, prompt, answers
        self.parts = told.content_format == "parts"
        self.targets = [i for i, p in enumerate(asked.document) if p.target]
        self.limit = asked.asks[0].sampling.text.max_tokens
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": served.name,
                     "system_fingerprint": f"fp_{served.hash[:12]}"}

    # -- whole --------------------------------------------------------------------------------------------------------

    async def whole(self, made: Sequence[Document]) -> dict[str, Any]:
        choices = [await self._choice(i, document) for i, document in enumerate(made)]
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": self._usage(made),
                "recipe": self.asked.recipe}

    async def _choice(self, index: int, document: Document) -> dict[str, Any]:
        pieces = [document.pieces[i] for i in self.targets]
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
        reason = self._reason(index)
        try:
            await self.context.allow(self.request, "answer", pieces, self.served)
        except Refused as refused:
            reason, pieces = "content_filter", []
            message["refusal"] = refused.reason
        if self.parts and pieces:
            message["content"] = [await self._part(n, p) for n, p in enumerate(pieces)]
        elif pieces:
            said = [_words(p) for p in pieces if not isinstance(p, Image)]
            message["content"] = BETWEEN.join(filter(None, said)) if said else None
            shown = [await self._part(n, p) for n, p in enumerate(pieces) if isinstance(p, Image)]
            if shown:
                message["images"] = shown
        return {"index": index, "message": message, "finish_reason": reason, "logprobs": None}

    async def _part(self, place: int, piece: Piece) -> dict[str, Any]:
        """A content part, which a later request may send again as it is."""
        if isinstance(piece, Image):
            data = await asyncio.to_thread(encoded, piece, "png", None)
            return {"type": "image_url", "index": place, "image_url": {"url": f"data:image/png;base64,{data}"}}
        if isinstance(piece, Boxes):
            boxes = [] if piece.boxes is None else [[float(v) for v in box] for box in piece.boxes]
            return {"type": "diptych", "diptych": {"kind": "boxes", "boxes": boxes, "labels": list(piece.labels)}}
        return {"type": "text", "text": _words(piece)}

    def _reason(self, index: int) -> str:
        """`length` if a text has all the tokens that it may have."""
        texts = [i for i in self.targets if not isinstance(self.asked.document.pieces[i], Image)]
        full = any(self.answers.tokens[index].get(i, 0) >= self.limit for i in texts)
        return "length" if full else "stop"

    def _usage(self, made: Sequence[Document]) -> dict[str, Any]:
        drawn = sum(tokens.get(i, 0) for tokens in self.answers.tokens for i in self.targets
                    if isinstance(self.asked.document.pieces[i], Image))
        every = sum(self.answers.produced(i) for i in range(len(self.answers.asks)))
        pictures = sum(isinstance(d.pieces[i], Image) for d in made for i in self.targets)
        self.context.count(self.request, self.served, self.prompt.total, every, given=self.asked.given, made=pictures)
        return {"prompt_tokens": self.prompt.total, "completion_tokens": every,
                "total_tokens": self.prompt.total + every,
                "prompt_tokens_details": {"text_tokens": self.prompt.text, "image_tokens": self.prompt.image},
                "completion_tokens_details": {"text_tokens": every - drawn, "image_tokens": drawn}}

    # -- streamed -----------------------------------------------------------------------------------------------------

    async def chunks(self) -> AsyncIterator[bytes]:
        lines = [Line(self.asked.document, held=self.context.policy is not None) for _ in self.answers.asks]
        ended: list[Document] = []
        for i in range(len(lines)):
            yield self._chunk(i, {"role": "assistant", "content": [] if self.parts else ""})
        async for told in self.answers.events(QUIET):
            if told is None:
                yield b": waiting\n\n"
                continue
            index, happened = told
            line = lines[index]
            if line.refused:
                continue
            if happened is None:
                ended.append(self.answers.document(index))
            try:
                for i, said in line.end(ended[-1]) if happened is None else line.take(happened):
                    piece = Text(text=said) if isinstance(said, str) else said
                    await self.context.allow(self.request, "answer", [piece], self.served)
                    yield self._chunk(index, await self._delta(line, i, said))
                if happened is None:
                    yield self._chunk(index, {}, self._reason(index))
            except Refused as refused:
                line.refused = True
                self.answers.requests[index].cancel()
                yield self._chunk(index, {"refusal": refused.reason}, "content_filter")
        usage = self._usage(ended)
        if self.told.stream_options and self.told.stream_options.include_usage:
            yield event({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage,
                         "recipe": self.asked.recipe})
        yield event("[DONE]")

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None = None) -> bytes:
        told = {**self.head, "object": "chat.completion.chunk",
                "choices": [{"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}]}
        return event(told | ({"recipe": self.asked.recipe} if reason else {}))

    async def _delta(self, line: "Line", i: int, said: "str | Piece") -> dict[str, Any]:
        place = self.targets.index(i)
        if self.parts:
            part = {"type": "text", "text": said} if isinstance(said, str) else await self._part(place, said)
            return {"content": [{**part, "index": place}]}
        if isinstance(said, Image):
            return {"images": [await self._part(place, said)]}
        words = said if isinstance(said, str) else _words(said)
        before = BETWEEN if line.joins(i) else ""
        return {"content": before + words}


class Line:
    """One answer as it streams: what is to be said of each event, so that all of it together is the whole answer.
    `held`: texts are said when they are complete."""

    def __init__(self, document: Document, *, held: bool) -> None:
        self.targets = [i for i, p in enumerate(document) if p.target]
        self.texts = {i for i in self.targets if isinstance(document.pieces[i], Text)}
        self.held, self.refused = held, False
        self.heard: dict[int, str] = {}
        self.shown: dict[int, int] = {}  # characters of a text, or 1 for what is said at once
        self.begun: list[int] = []  # pieces that went into the string, in order

    def take(self, happened: Event) -> list[tuple[int, str | Piece]]:
        out: list[tuple[int, str | Piece]] = []
        if happened.kind == "text":
            if happened.piece not in self.texts:  # boxes are said in words, and shown when they are boxes
                return out
            if self.held:
                out += [told for i in self.heard if i != happened.piece for told in self._text(i, self.heard[i])]
            self.heard[happened.piece] = self.heard.get(happened.piece, "") + happened.value
            # A finished text has no blanks around it.
            return out if self.held else self._text(happened.piece, self.heard[happened.piece])
        if happened.kind not in ("picture", "boxes"):
            return out
        if self.held:
            out += [told for i in self.heard for told in self._text(i, self.heard[i])]
        self.shown[happened.piece] = 1
        made = happened.value if happened.kind == "boxes" else Image(role="assistant", target=True,
                                                                      pixels=happened.value)
        return [*out, (happened.piece, made)]

    def end(self, document: Document) -> list[tuple[int, str | Piece]]:
        """What has not been said yet."""
        out: list[tuple[int, str | Piece]] = []
        for i in self.targets:
            piece = document.pieces[i]
            if isinstance(piece, Text):
                out += self._text(i, piece.text or "")
            elif i not in self.shown:
                out.append((i, piece))
        return out

    def _text(self, i: int, text: str) -> list[tuple[int, str | Piece]]:
        new = text.strip()[self.shown.get(i, 0):]
        self.shown[i] = self.shown.get(i, 0) + len(new)
        return [(i, new)] if new else []

    def joins(self, i: int) -> bool:
        """Whether piece i begins here, behind another in the same string."""
        if i in self.begun:
            return False
        self.begun.append(i)
        return len(self.begun) > 1


def _words(piece: Piece) -> str:
    """What a string says of a piece: boxes as `diptych draw --layout` reads them."""
    if isinstance(piece, Boxes):
        return json.dumps(layout_json(piece))
    return piece.text or "" if isinstance(piece, Text) else ""
