"""POST /v1/images/generations and /v1/images/edits."""
import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response

from diptych.document import Document, Image
from diptych.serve import requests
from diptych.serve.context import Context
from diptych.serve.errors import ApiError
from diptych.serve.limits import fields_of, read_form, read_json
from diptych.serve.models import Answers, PromptTokens, Served
from diptych.serve.pictures import composite, encoded
from diptych.serve.requests import Asked
from diptych.serve.schema import EditRequest, GenerationRequest
from diptych.serve.stream import QUIET, EventStream, event, while_there
from diptych.systems.base import Progress

Kind = Literal["image_generation", "image_edit"]
IMAGES = ("image", "image[]")


async def generate(context: Context, request: Request) -> Response:
    told = context.validated(GenerationRequest, await read_json(request))
    served = context.models.find(told.model)
    asked = requests.of_generation(told, served)
    return await _answer(context, request, "image_generation", told, served, asked, None)


async def edit(context: Context, request: Request) -> Response:
    form = await read_form(request, context.settings.max_images + 1, context.settings.max_body)
    try:
        texts, files = fields_of(form)
        told = context.validated(EditRequest, texts)
        unknown = sorted(set(files) - {*IMAGES, "mask"})
        if unknown:
            raise ApiError(400, f"expected files as image, image[] or mask, got {unknown[0][:80]!r}",
                           code="unknown_parameter", param=unknown[0][:80])
        served = context.models.find(told.model)
        images, mask = await _pictures(context, served, files)
    finally:
        await form.close()
    asked = requests.of_edit(told, served, images)
    if mask is not None:
        asked.recipe["mask"] = "composite"
    return await _answer(context, request, "image_edit", told, served, asked, mask)


async def _pictures(context: Context, served: Served, files: dict[str, list[UploadFile]]
                    ) -> tuple[list[Image], Image | None]:
    """The pictures to draw from, and where to draw in the first of them."""
    budget = context.reader.budget(served.system.config)
    uploads = [file for name in IMAGES for file in files.get(name, ())]
    masks = files.get("mask", [])
    if not uploads:
        raise ApiError(400, "expected a picture to edit, got none", code="missing_required_parameter", param="image")
    if len(masks) > 1:
        raise ApiError(400, f"expected one mask, got {len(masks)}", param="mask")
    read = [await budget.from_bytes(await file.read(), "image") for file in uploads]
    mask = await budget.mask(await masks[0].read(), read[0][1], "mask") if masks else None
    return [image for image, _ in read], mask


async def _answer(context: Context, request: Request, kind: Kind, told: GenerationRequest | EditRequest,
                  served: Served, asked: Asked, mask: Image | None) -> Response:
    context.note(request, model=served.name, kind=kind, answers=told.n or 1, stream=bool(told.stream))
    prompt = await asyncio.to_thread(served.check_length, asked.document)
    given = [p for p in asked.document if not p.target]
    await context.allow(request, "prompt", given, served, told.negative_prompt)
    answers = served.submit(asked.asks)
    board = Board(context, request, kind, told, served, asked, prompt, answers, mask)
    if told.stream:
        return EventStream(board.events(), answers.cancel, context.settings.send_seconds)
    made = await while_there(request, answers.documents(), answers.cancel)
    return context.json(await board.whole(made))


class Board:
    """One request and how its pictures are put."""

    def __init__(self, context: Context, request: Request, kind: Kind, told: GenerationRequest | EditRequest,
                 served: Served, asked: Asked, prompt: PromptTokens, answers: Answers, mask: Image | None) -> None:
        self.context, self.request, self.kind, self.told, self.served = context, request, kind, told, served
        self.asked, self.prompt, self.answers, self.mask = asked, prompt, answers, mask
        self.created = int(time.time())
        self.format: Literal["png", "jpeg", "webp"] = told.output_format or "png"

    async def whole(self, made: list[Document]) -> dict[str, Any]:
        data = []
        for index, document in enumerate(made):
            picture = self._masked(document.of(Image)[-1])
            await self.context.allow(self.request, "answer", [picture], self.served)
            shown = await self._encoded(picture)
            told = {"url": f"data:image/{self.format};base64,{shown}"} if self.told.response_format == "url" else {
                "b64_json": shown}
            layout = requests.layout_of(document)
            data.append(told | {"seed": self.answers.asks[index].seed} | ({"layout": layout} if layout else {}))
        return {"created": self.created, "data": data, **self._look(made[0].of(Image)[-1]),
                "usage": self._usage(len(made)), "recipe": self.asked.recipe}

    async def events(self) -> AsyncIterator[bytes]:
        shown = [0] * len(self.answers.asks)
        async for told in self.answers.events(QUIET):
            if told is None:
                yield b": waiting\n\n"
                continue
            index, happened = told
            if happened is None:
                document = self.answers.document(index)
                layout = requests.layout_of(document)
                yield await self._event("completed", index, self._masked(document.of(Image)[-1]),
                                        usage=self._usage_of(index), recipe=self.asked.recipe,
                                        seed=self.answers.asks[index].seed, **({"layout": layout} if layout else {}))
            elif happened.kind == "partial" and shown[index] < (self.told.partial_images or 0):
                picture = self._masked(Image(pixels=happened.value))
                yield await self._event("partial_image", index, picture, partial_image_index=shown[index],
                                        **_progress(happened.progress))
                shown[index] += 1
        self._usage(len(shown))

    async def _event(self, name: str, index: int, picture: Image, **facts: Any) -> bytes:
        await self.context.allow(self.request, "answer", [picture], self.served)
        told = {"type": f"{self.kind}.{name}", "b64_json": await self._encoded(picture), "created_at": self.created,
                "index": index, **self._look(picture), **facts}
        return event(told, told["type"])

    def _masked(self, drawn: Image) -> Image:
        """Outside the mask the first picture stays as it was."""
        return drawn if self.mask is None else composite(drawn, self.asked.document.of(Image)[0], self.mask)

    async def _encoded(self, picture: Image) -> str:
        return await asyncio.to_thread(encoded, picture, self.format, self.told.output_compression)

    def _look(self, picture: Image) -> dict[str, Any]:
        height, width = picture.size or (0, 0)
        return {"size": f"{width}x{height}", "output_format": self.format, "background": "opaque", "quality": "auto"}

    def _usage_of(self, index: int) -> dict[str, Any]:
        made = self.answers.produced(index)
        return {"input_tokens": self.prompt.total, "output_tokens": made, "total_tokens": self.prompt.total + made,
                "input_tokens_details": {"text_tokens": self.prompt.text, "image_tokens": self.prompt.image}}

    def _usage(self, pictures: int) -> dict[str, Any]:
        """Of all pictures together; the prompt counts once."""
        made = sum(self.answers.produced(i) for i in range(len(self.answers.asks)))
        self.context.count(self.request, self.served, self.prompt.total, made, given=self.asked.given, made=pictures)
        return self._usage_of(0) | {"output_tokens": made, "total_tokens": self.prompt.total + made}


def _progress(progress: Progress | None) -> dict[str, Any]:
    """How far a picture is, as JSON: the cells that are settled as rows of 0 and 1."""
    if progress is None:
        return {}
    told: dict[str, Any] = {"step": progress.step, "steps": progress.steps}
    if progress.time is not None:
        told["time"] = round(progress.time, 4)
    if progress.scale is not None:
        told["scale"] = list(progress.scale)
    if progress.known is not None:
        told["known"] = ["".join(map(str, row)) for row in progress.known.int().tolist()]
    return {"progress": told}
