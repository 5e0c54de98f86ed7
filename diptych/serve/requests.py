"""Requests to documents: the same builders as the command line's, so that an answer is the library's."""
import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diptych
from diptych.cli.common import changed_sampling
from diptych.cli.draw import drawing
from diptych.cli.edit import editing
from diptych.document import Boxes, Document, Image, Piece, Text
from diptych.serve.errors import ApiError
from diptych.serve.models import Ask, Served, sampling_dict, words_scale
from diptych.serve.pictures import Budget
from diptych.serve.schema import IMAGE_KINDS, MAX_SEED, ChatRequest, EditRequest, GenerationRequest, Sampled
from diptych.systems.base import Sampling

TARGETS: dict[str, type[Piece]] = {"text": Text, "image": Image, "boxes": Boxes}
FREE_SEEDS = 2**31  # seeds that are drawn for those who give none


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request as documents: one per answer, alike but for their seeds."""

    asks: list[Ask]
    recipe: dict[str, Any]

    @property
    def document(self) -> Document:
        return self.asks[0].document

    @property
    def given(self) -> int:
        """Pictures that came with the request."""
        return sum(isinstance(p, Image) and not p.target for p in self.document)


async def of_chat(request: ChatRequest, served: Served, budget: Budget) -> Asked:
    """The conversation, and behind it what is to be said."""
    pictures: dict[str, Image] = {}
    messages = [await _message(m.model_dump(exclude_none=True), f"messages[{i}]", pictures, budget)
                for i, m in enumerate(request.messages)]
    said = Document.from_messages(messages, read=pictures.__getitem__)
    if not len(said):
        raise ApiError(400, "expected a message with something in it, got none", param="messages")
    size = served.size(request.size)
    wanted = request.answer or request.modalities or ["text"]
    if len(set(request.modalities or ())) < len(request.modalities or ()):
        raise ApiError(400, "expected every modality once; fix: use answer for more", param="modalities")
    targets = [_target(kind, size) for kind in wanted]
    if size and "image" not in wanted:
        raise ApiError(400, "expected a size together with a picture to draw, got it without", param="size")
    text = {name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(request, name)) is not None}
    limits = [v for v in (request.max_tokens, request.max_completion_tokens) if v is not None]
    own = served.system.default_sampling().text
    text["max_tokens"] = min([*limits, served.settings.context] if limits else [own.max_tokens,
                                                                                served.settings.context])
    sampling = sampling_of(request, served, text=dataclasses.replace(own, **text))
    return _asked(request, served, Document((*said, *targets)), sampling, request.n or 1)


async def _message(message: dict[str, Any], where: str, pictures: dict[str, Image], budget: Budget) -> dict[str, Any]:
    """With every address replaced by a name of ours, under which its picture is kept."""
    content = message.get("content") or []
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else [dict(p) for p in content]
    parts += [dict(p) for p in message.get("images", ())]
    for i, part in enumerate(parts):
        if part["type"] in IMAGE_KINDS:
            url = part["image_url"]
            name = f"picture {len(pictures)}"
            pictures[name] = await budget.from_url(url if isinstance(url, str) else url["url"],
                                                   f"{where}.content[{i}].image_url")
            parts[i] = {"type": "image_url", "image_url": name}
    return {"role": message["role"], "content": parts}


def _target(kind: str, size: tuple[int, int] | None) -> Piece:
    piece = TARGETS[kind](role="assistant", target=True)
    return piece.replace(size=size) if isinstance(piece, Image) else piece


def of_generation(request: GenerationRequest, served: Served) -> Asked:
    """As `diptych draw` asks."""
    _draws(served)
    if not request.prompt.strip() and request.boxes is None:
        raise ApiError(400, "expected words or boxes, got neither", param="prompt")
    if request.plan and (request.boxes is not None or not request.prompt.strip()):
        raise ApiError(400, "expected a plan with words alone, got a layout or no words", param="plan")
    boxes = None
    if request.boxes is not None:
        boxes = Boxes(boxes=[b.box for b in request.boxes], labels=tuple(b.label for b in request.boxes))  # type: ignore[arg-type]
    sampling = sampling_of(request, served, partial=_partial(request))
    plan = request.plan if request.plan is not None else sampling.plan and boxes is None
    document = drawing(request.prompt, boxes, plan=plan, size=served.size(request.size))
    return _asked(request, served, document, sampling, request.n or 1, plan=plan)


def of_edit(request: EditRequest, served: Served, images: Sequence[Image]) -> Asked:
    """As `diptych edit` asks."""
    _draws(served)
    if not request.prompt.strip():
        raise ApiError(400, "expected an instruction, got none", param="prompt")
    sampling = sampling_of(request, served, partial=_partial(request))
    return _asked(request, served, editing(images, request.prompt, served.size(request.size)), sampling,
                  request.n or 1)


def _draws(served: Served) -> None:
    if not served.system.draws:
        raise ApiError(400, f"expected a model that draws, got {served.name!r}, which only reads pictures",
                       param="model")


def _partial(request: GenerationRequest | EditRequest) -> int:
    """How often a picture is to be shown before it is finished."""
    return request.partial_images or 0 if request.stream else 0


def sampling_of(request: Sampled, served: Served, **changes: Any) -> Sampling:
    """The model's own way with what the request changes."""
    if request.negative_prompt:
        changes["negative"] = request.negative_prompt
        if not served.system.negatives:
            raise ApiError(400, f"expected a model that takes a negative prompt, got {served.name!r}",
                           param="negative_prompt")
    sampling = changed_sampling(served.system, request.num_inference_steps, request.guidance_scale, **changes)
    if request.negative_prompt and words_scale(sampling) == 1:
        raise ApiError(400, "expected guidance together with a negative prompt, got none; fix: set guidance_scale",
                       param="guidance_scale")
    return sampling


def _asked(request: Sampled, served: Served, document: Document, sampling: Sampling, count: int,
           **facts: Any) -> Asked:
    seed = secrets.randbelow(FREE_SEEDS) if request.seed is None else request.seed
    if seed + count - 1 > MAX_SEED:
        raise ApiError(400, f"expected seed + n of at most {MAX_SEED + 1}, got {seed + count}", param="seed")
    seeds = [seed + i for i in range(count)]
    recipe = {"model": served.name, "model_hash": served.hash, "version": diptych.__version__, "seed": seed,
              "seeds": seeds, "steps": sampling.evaluations, "guidance": words_scale(sampling), "task": document.task,
              "sampling": sampling_dict(sampling), **facts}
    return Asked(asks=[Ask(document=document, sampling=sampling, seed=s) for s in seeds], recipe=recipe)


def layout_of(document: Document) -> list[dict[str, Any]] | None:
    """The boxes that the model placed before it drew."""
    from diptych.cli.draw import layout_json

    planned: Mapping[int, Boxes] = {i: p for i, p in enumerate(document) if isinstance(p, Boxes) and p.target}
    return layout_json(next(iter(planned.values()))) if planned else None
