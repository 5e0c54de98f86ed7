"""Documents: the one form in which every task enters and leaves Diptych.

A document is an ordered list of pieces. Each piece has a role (who says it) and a flag `target` (whether the model
has to produce it). Captioning is `[Image, Text(target)]`, drawing is `[Text, Image(target)]`, editing is
`[Image, Text, Image(target)]`, a story alternates both. A target whose content is None is still to be produced.

Arrays are numpy so that data workers need no torch. Conventions: images float32 in [-1, 1], (3, height, width);
video (frames, 3, height, width); audio mono float32 in [-1, 1]; boxes xyxy in [0, 1]; masks bool (height, width).
"""
import base64
import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, eq=False, kw_only=True)
class Piece:
    """What all pieces share. Use one of the subclasses."""

    role: str = "user"
    target: bool = False

    kind: ClassVar[str] = "piece"

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"expected role to be one of {ROLES}, got {self.role!r}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                object.__setattr__(self, field.name, self._check(field.name, value))

    def _check(self, name: str, value: Any) -> Any:
        """Validate and normalise one field; subclasses override."""
        return value

    @property
    def empty(self) -> bool:
        """True while the content is still to be produced."""
        return getattr(self, dataclasses.fields(self)[2].name) is None

    def emptied(self) -> Self:
        """Without content: what is asked for. Facts about the answer (size, rates) stay, parts of it do not."""
        extra = {"labels": ()} if isinstance(self, Boxes) else {}
        return self.replace(**{dataclasses.fields(self)[2].name: None}, **extra)

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(_equal(getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))

    __hash__ = None  # type: ignore[assignment]  # arrays inside: compare, never hash


@dataclass(frozen=True, eq=False, kw_only=True)
class Text(Piece):
    text: str | None = None
    kind: ClassVar[str] = "text"

    def _check(self, name: str, value: Any) -> Any:
        return _string(value, name) if name == "text" else value


@dataclass(frozen=True, eq=False, kw_only=True)
class Image(Piece):
    """`size` is (height, width): what to draw while `pixels` is None, the shape of `pixels` otherwise."""

    pixels: np.ndarray | None = None
    size: tuple[int, int] | None = None
    kind: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pixels is not None:
            object.__setattr__(self, "size", tuple(self.pixels.shape[1:]))

    def _check(self, name: str, value: Any) -> Any:
        if name == "pixels":
            return _array(value, np.float32, 3, "image pixels of shape (3, height, width)", channels=0)
        return (int(value[0]), int(value[1])) if name == "size" else value

    @classmethod
    def from_uint8(cls, array: np.ndarray, **kwargs: Any) -> "Image":
        """From 8-bit RGB of shape (height, width, 3)."""
        array = np.asarray(array)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(f"expected uint8 of shape (height, width, 3), got {array.dtype} {array.shape}")
        return cls(pixels=array.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1, **kwargs)

    def to_uint8(self) -> np.ndarray:
        """8-bit RGB, shape (height, width, 3)."""
        if self.pixels is None:
            raise ValueError("expected an image with pixels, got one still to be drawn; fix: generate it first")
        return np.rint((np.clip(self.pixels, -1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)


@dataclass(frozen=True, eq=False, kw_only=True)
class Video(Piece):
    frames: np.ndarray | None = None
    frames_per_second: float = 8.0
    kind: ClassVar[str] = "video"

    def _check(self, name: str, value: Any) -> Any:
        if name == "frames":
            return _array(value, np.float32, 4, "video of shape (frames, 3, height, width)", channels=1)
        return value


@dataclass(frozen=True, eq=False, kw_only=True)
class Audio(Piece):
    """Mono."""

    samples: np.ndarray | None = None
    sample_rate: int = 16000
    kind: ClassVar[str] = "audio"

    def _check(self, name: str, value: Any) -> Any:
        return _array(value, np.float32, 1, "audio of shape (samples,)") if name == "samples" else value


@dataclass(frozen=True, eq=False, kw_only=True)
class Svg(Piece):
    source: str | None = None
    kind: ClassVar[str] = "svg"

    def _check(self, name: str, value: Any) -> Any:
        return _string(value, name) if name == "source" else value


@dataclass(frozen=True, eq=False, kw_only=True)
class Boxes(Piece):
    """`boxes` (n, 4) xyxy in [0, 1], origin top left; `labels` empty or one text per box."""

    boxes: np.ndarray | None = None
    labels: tuple[str, ...] = ()
    kind: ClassVar[str] = "boxes"

    def _check(self, name: str, value: Any) -> Any:
        if name == "boxes":
            value = np.asarray(value, np.float32)
            value = value.reshape(-1, 4) if value.size == 0 else value
            if value.ndim != 2 or value.shape[1] != 4:
                raise ValueError(f"expected boxes of shape (n, 4) as xyxy in [0, 1], got {value.shape}")
        if name == "labels":
            value = tuple(value)
            if self.boxes is not None and value and len(value) != len(self.boxes):
                raise ValueError(f"expected one label per box ({len(self.boxes)}) or none, got {len(value)}")
        return value


@dataclass(frozen=True, eq=False, kw_only=True)
class Mask(Piece):
    mask: np.ndarray | None = None
    kind: ClassVar[str] = "mask"

    def _check(self, name: str, value: Any) -> Any:
        return _array(value, np.bool_, 2, "mask of shape (height, width)") if name == "mask" else value


@dataclass(frozen=True, eq=False, kw_only=True)
class Actions(Piece):
    """A chunk of actions (steps, dimensions), usually in [-1, 1]."""

    actions: np.ndarray | None = None
    kind: ClassVar[str] = "actions"

    def _check(self, name: str, value: Any) -> Any:
        return _array(value, np.float32, 2, "actions of shape (steps, dimensions)") if name == "actions" else value


PIECES: dict[str, type[Piece]] = {c.kind: c for c in (Text, Image, Video, Audio, Svg, Boxes, Mask, Actions)}


@dataclass(frozen=True, eq=False)
class Document:
    """An ordered list of pieces with provenance.

    `task` names what the document trains or asks (`caption`, `draw`, ...); `meta` carries JSON-able facts that
    verifiers need (for the world: the scene record, the seed) and that no model sees.
    """

    pieces: tuple[Piece, ...]
    task: str = ""
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pieces", tuple(self.pieces))
        for piece in self.pieces:
            if not isinstance(piece, Piece):
                raise TypeError(f"expected pieces ({', '.join(PIECES)}), got {type(piece).__name__}")

    def __iter__(self) -> Iterator[Piece]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Document):
            return NotImplemented
        return (self.pieces, self.task, dict(self.meta)) == (other.pieces, other.task, dict(other.meta))

    __hash__ = None  # type: ignore[assignment]

    @property
    def targets(self) -> tuple[Piece, ...]:
        return tuple(p for p in self.pieces if p.target)

    def of(self, kind: type[Piece]) -> tuple[Any, ...]:
        """All pieces of one kind, in order."""
        return tuple(p for p in self.pieces if isinstance(p, kind))

    def prompt(self) -> "Document":
        """The same document with the content of every target removed: what a model is asked."""
        return dataclasses.replace(self, pieces=tuple(p.emptied() if p.target else p for p in self.pieces))

    # -- JSON ---------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return {"task": self.task, "meta": dict(self.meta), "pieces": [piece_to_dict(p) for p in self.pieces]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Document":
        _known(data, {"task", "meta", "pieces"}, "document")
        if not isinstance(data.get("pieces"), list):
            raise ValueError(f"expected a document with a list of pieces, got {type(data.get('pieces')).__name__}")
        return cls([piece_from_dict(p) for p in data["pieces"]], data.get("task", ""), data.get("meta", {}))  # type: ignore[arg-type]

    def to_json(self) -> str:
        """Images become 8-bit PNG, so only 8-bit pixel values survive exactly."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    @classmethod
    def from_json(cls, source: str) -> "Document":
        return cls.from_dict(json.loads(source))

    # -- chat messages ------------------------------------------------------------------------------------------

    def to_messages(self) -> list[dict[str, Any]]:
        """OpenAI chat messages. Neighbouring pieces of one role become one message; empty targets are left out.

        Text and images use the standard content parts, everything else `{"type": "diptych", "diptych": {...}}`.
        """
        messages: list[dict[str, Any]] = []
        for piece in (p for p in self.pieces if not p.empty):
            if not messages or messages[-1]["role"] != piece.role:
                messages.append({"role": piece.role, "content": []})
            messages[-1]["content"].append(_piece_to_part(piece))
        return messages

    @classmethod
    def from_messages(cls, messages: Iterable[Mapping[str, Any]], *, train: bool = False, task: str = "",
                      read: Callable[[str], Image] | None = None) -> "Document":
        """From OpenAI chat messages (`content` a string or a list of parts).

        With `train` every assistant piece becomes a target; otherwise all pieces are context. Pictures are data URLs;
        `read` turns other addresses (say paths) into images, without it they are refused.
        """
        pieces: list[Piece] = []
        for message in messages:
            role, content = message.get("role"), message.get("content")
            role = "system" if role == "developer" else role
            if role not in ROLES:
                raise ValueError(f"expected message role to be one of {ROLES}, got {role!r}")
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else (content or [])
            target = train and role == "assistant"
            pieces += [_piece_from_part(part, read).replace(role=role, target=target) for part in parts]
        return cls(tuple(pieces), task)


# -- conversion of single pieces ------------------------------------------------------------------------------------

def piece_to_dict(piece: Piece) -> dict[str, Any]:
    out: dict[str, Any] = {"kind": piece.kind, "role": piece.role, "target": piece.target}
    for field in dataclasses.fields(piece)[2:]:
        out[field.name] = _encode(getattr(piece, field.name), image=isinstance(piece, Image))
    return out


def piece_from_dict(data: Mapping[str, Any]) -> Piece:
    kind = data.get("kind")
    if kind not in PIECES:
        raise ValueError(f"expected piece kind to be one of {', '.join(PIECES)}, got {kind!r}")
    cls = PIECES[kind]
    names = {f.name for f in dataclasses.fields(cls)}
    _known(data, names | {"kind"}, kind)
    return cls(**{k: _decode(v) for k, v in data.items() if k in names})


def encode_png(image: Image) -> bytes:
    from PIL import Image as Pil

    buffer = io.BytesIO()
    Pil.fromarray(image.to_uint8()).save(buffer, "PNG")
    return buffer.getvalue()


def _piece_to_part(piece: Piece) -> dict[str, Any]:
    if isinstance(piece, Text):
        return {"type": "text", "text": piece.text}
    if isinstance(piece, Image):
        data = base64.b64encode(encode_png(piece)).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    if isinstance(piece, Audio):
        from diptych.data.sounds import encode_wav

        data = base64.b64encode(encode_wav(piece)).decode()
        return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    fields = piece_to_dict(piece)
    return {"type": "diptych", "diptych": {k: v for k, v in fields.items() if k not in ("role", "target")}}


def _piece_from_part(part: Mapping[str, Any], read: Callable[[str], Image] | None) -> Piece:
    kind = part.get("type")
    if kind in ("text", "input_text", "output_text"):
        return Text(text=part["text"])
    if kind in ("image_url", "input_image", "image"):
        url = part.get("image_url", part.get("image", part.get("path")))
        url = _string(url["url"] if isinstance(url, Mapping) else url, kind)
        return _decode_data_url(url) if read is None or url.startswith("data:") else read(url)
    if kind == "input_audio":
        from diptych.data.sounds import decode_wav

        audio = part["input_audio"]
        return decode_wav(_unbase64(audio["data"], "input_audio"))
    if kind == "diptych":
        return piece_from_dict(part["diptych"])
    raise ValueError(f"expected content part type text, image_url, input_audio or diptych, got {kind!r}")


def _decode_data_url(url: str) -> Image:
    head, _, body = url.partition(",")
    if not (head.lower().startswith("data:image/") and head.lower().endswith(";base64")):
        raise ValueError(f"expected an image as a base64 data URL, got {url[:40]!r}; fix: read the file and inline it")
    from diptych.data.images import decode_image  # safe decoding is one place

    return decode_image(_unbase64(body, "data URL"), name="data URL")


def _unbase64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise ValueError(f"expected base64 in {name}, got damaged text: {error}") from error


def _encode(value: Any, *, image: bool) -> Any:
    if not isinstance(value, np.ndarray):
        return list(value) if isinstance(value, tuple) else value
    if image:
        return {"png": base64.b64encode(encode_png(Image(pixels=value))).decode()}
    data = np.ascontiguousarray(value)
    return {"dtype": data.dtype.str, "shape": list(data.shape), "data": base64.b64encode(data.tobytes()).decode()}


def _decode(value: Any) -> Any:
    if isinstance(value, Mapping) and "png" in value:
        from diptych.data.images import decode_image

        return decode_image(_unbase64(value["png"], "document image"), name="document image").pixels
    if isinstance(value, Mapping) and "dtype" in value:
        raw = np.frombuffer(_unbase64(value["data"], "document array"), np.dtype(value["dtype"]))
        return raw.reshape(value["shape"]).copy()
    return value


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected {name} to be a str, got {type(value).__name__}")
    return value


def _array(value: Any, dtype: Any, ndim: int, what: str, channels: int | None = None) -> np.ndarray:
    if hasattr(value, "detach"):  # a torch tensor
        value = value.detach().float().cpu().numpy()
    array = np.asarray(value)
    if array.ndim != ndim or (channels is not None and array.shape[channels] != 3):
        raise ValueError(f"expected {what}, got shape {array.shape}")
    return array if array.dtype == dtype else array.astype(dtype)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    return a == b


def _known(data: Mapping[str, Any], names: set[str], what: str) -> None:
    if unknown := sorted(set(data) - names):
        raise ValueError(f"expected {what} fields {', '.join(sorted(names))}, got unknown {', '.join(unknown)}")
