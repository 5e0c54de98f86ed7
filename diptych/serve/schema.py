"""What requests may hold. A type that allows one value only is a parameter of the OpenAI API that would change the
answer and cannot be honoured; one of type Any is taken without effect: it is about billing, storage, caches or speed.
Everything else is an error.
"""
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)

MAX_TEXT = 32_000  # characters of one text
MAX_PARTIAL = 64  # pictures on the way to one: each costs a pass of the codec
MAX_SEED = 2**53 - 1  # the largest whole number that every JSON reader keeps

Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Words = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
Size = Annotated[str, StringConstraints(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")]
Empty = Annotated[list[Any], Field(max_length=0)]
Nothing = Annotated[dict[str, Any], Field(max_length=0)]
Zero = Annotated[float, Field(ge=0, le=0)]


def _false(value: bool) -> bool:
    if value:
        raise ValueError("expected false, got true")
    return value


# not Literal[False], which takes a 0 too
Off = Annotated[bool, AfterValidator(_false), WithJsonSchema({"type": "boolean", "const": False})]


def no(reason: str, default: Any = None) -> Any:
    """A parameter that has to keep its neutral value, and why."""
    return Field(default, json_schema_extra={"x-reason": reason})


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Sampled(Strict):
    """What every endpoint takes."""

    model: Name | None = None
    """One of GET /v1/models; the first of them if none is given."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    """The same seed gives the same answer. Answer i of n has seed + i. Drawn, and told in the recipe, if not given."""
    size: Size | None = None
    """WIDTHxHEIGHT of pictures, in pixels; auto: the model's own."""
    num_inference_steps: Annotated[int, Field(ge=1, le=250)] | None = None
    """Network evaluations per picture."""
    guidance_scale: Annotated[float, Field(ge=0, le=50)] | None = None
    """How strongly the words guide a picture; 1: not at all."""
    negative_prompt: Words | None = None
    """What a picture should not show."""
    stream: bool | None = None
    user: Any = None
    safety_identifier: Any = None


# -- chat -------------------------------------------------------------------------------------------------------------

class TextPart(Strict):
    type: Literal["text", "input_text", "output_text"]
    text: Words


class Url(Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


IMAGE_KINDS = ("image_url", "input_image", "image")


class ImagePart(Strict):
    type: Literal["image_url", "input_image", "image"]
    image_url: Url | str
    """A data URL, or where the server allows it an address."""
    index: int | None = None


class BoxesContent(Strict):
    kind: Literal["boxes"]
    boxes: Annotated[list[Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=4, max_length=4)]],
                     Field(max_length=64)]
    labels: Annotated[list[Annotated[str, StringConstraints(max_length=200)]], Field(max_length=64)] = []

    @model_validator(mode="after")
    def _as_many(self) -> "BoxesContent":
        if self.labels and len(self.labels) != len(self.boxes):
            raise ValueError(f"expected one label per box ({len(self.boxes)}) or none, got {len(self.labels)}")
        return self


class BoxesPart(Strict):
    type: Literal["diptych"]
    diptych: BoxesContent


Part = Annotated[TextPart | ImagePart | BoxesPart, Field(discriminator="type")]


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Words | Annotated[list[Part], Field(max_length=64)] | None = None
    images: Annotated[list[ImagePart], Field(max_length=16)] | None = None
    """Pictures beside a text, as answers carry them; they follow the content."""
    name: Any = None
    refusal: Any = None
    annotations: Any = None
    audio: None = None
    function_call: None = None
    tool_calls: Empty | None = None


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextFormat(Strict):
    type: Literal["text"]


class ChatRequest(Sampled):
    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    modalities: Annotated[list[Literal["text", "image"]], Field(min_length=1, max_length=2)] | None = None
    """What the answer consists of, in this order; a text if not given."""
    answer: Annotated[list[Literal["text", "image", "boxes"]], Field(min_length=1, max_length=8)] | None = None
    """The same for longer answers, such as ["text", "image", "text", "image"], and for boxes."""
    content_format: Literal["text", "parts"] = "text"
    """text: content is a string and pictures are in images; parts: content lists all parts in order."""
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Of words; 0 takes the likeliest. If not given, what the model was made for."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=100_000)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    stream_options: StreamOptions | None = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    stop: Empty | None = no("stop sequences are not supported")
    presence_penalty: Zero | None = no("penalties are not supported")
    frequency_penalty: Zero | None = no("penalties are not supported")
    logit_bias: Nothing | None = no("logits cannot be changed from outside")
    logprobs: Off | None = no("log-probs are not returned; use `score` of the library")
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = no("log-probs are not returned")
    tools: Empty | None = no("tools are not supported")
    tool_choice: Literal["none", "auto"] | None = no("tools are not supported")
    functions: Empty | None = no("tools are not supported")
    function_call: Literal["none", "auto"] | None = no("tools are not supported")
    response_format: TextFormat | None = no("answers are plain text")
    audio: None = no("no sound is produced")
    reasoning_effort: Literal["none"] | None = no("there is no effort to choose")
    verbosity: Literal["medium"] | None = no("there is no verbosity to choose")
    web_search_options: None = no("there is no search")


# -- pictures ---------------------------------------------------------------------------------------------------------

class LabelledBox(Strict):
    label: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    box: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=4, max_length=4)]
    """x0, y0, x1, y1 from the top left, 0 to 1."""

    @model_validator(mode="after")
    def _has_an_area(self) -> "LabelledBox":
        if not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
            raise ValueError(f"expected x0 < x1 and y0 < y1, got {self.box}; fix: divide pixels by the picture's sides")
        return self


class PictureRequest(Sampled):
    """What drawing and editing share."""

    prompt: Words
    n: Annotated[int, Field(ge=1, le=10)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    """url gives data URLs: nothing is kept on the server."""
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    """Quality of jpeg and webp."""
    partial_images: Annotated[int, Field(ge=0, le=MAX_PARTIAL)] | None = None
    """With stream: how often to show a picture on its way, evenly; every step if there are fewer. Of the OpenAI API 0
    to 3."""
    moderation: Any = None
    quality: Literal["auto", "standard"] | None = no("there are no qualities to choose; use num_inference_steps")
    background: Literal["auto", "opaque"] | None = no("pictures are opaque")


class GenerationRequest(PictureRequest):
    boxes: Annotated[list[LabelledBox], Field(min_length=1, max_length=64)] | None = None
    """A layout to fill."""
    plan: bool | None = None
    """Whether the model places boxes before it draws; if not given, what suits the model."""
    style: None = no("there are no styles to choose; say it in the prompt")


class EditRequest(PictureRequest):
    """The fields of a form beside its files, `image` or `image[]` (1 to 16) and `mask`."""

    model_config = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False, use_attribute_docstrings=True)
    input_fidelity: Literal["low"] | None = no("how closely a picture is kept cannot be chosen; use a mask")


# -- answers ----------------------------------------------------------------------------------------------------------

class Open(BaseModel):
    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)


class Recipe(Open):
    """Enough to repeat an answer: `diptych.load_system(...).generate(...)` with this sampling and seed."""

    model: str
    model_hash: str
    version: str
    seed: int
    seeds: list[int]
    steps: int
    guidance: float
    sampling: dict[str, Any]


class ModelCard(Open):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Open):
    object: Literal["list"]
    data: list[ModelCard]


class TokenRun(Open):
    """Tokens of one kind in a row."""

    kind: str
    noised: bool
    count: int


class Attention(Open):
    """Who attends to whom in one document."""

    object: Literal["attention"]
    model: str
    task: str
    count: int
    tokens: list[TokenRun]
    pieces: list[dict[str, Any]]
    mask: str
    """Base64 of count x count bits, the highest of a byte first: rows are queries, columns are keys."""


class AlignmentCurve(Open):
    task: str
    values: list[float] | None
    """By depth: before the first layer, and behind each."""
    error: str | None


class Alignment(Open):
    """The share of nearest neighbours that documents have in common by their pictures and by their words."""

    object: Literal["alignment"]
    model: str
    documents: int
    neighbours: int
    chance: float
    curves: list[AlignmentCurve]


class ChatUsage(Open):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatAnswer(Open):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: ChatUsage
    recipe: Recipe


class PictureUsage(Open):
    input_tokens: int
    output_tokens: int
    total_tokens: int


class PictureAnswer(Open):
    created: int
    data: list[dict[str, Any]]
    usage: PictureUsage
    recipe: Recipe


class ErrorContent(Open):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Open):
    error: ErrorContent


class Health(Open):
    status: Literal["ok"]
    version: str
