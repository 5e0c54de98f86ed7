"""Every model of this library in lmms-eval, whose tasks then ask it: the class that its runner loads.

    lmms-eval --model diptych --model_args pretrained=mini --tasks NAME

`pretrained` is a folder of ours, of a published checkpoint, or a bundled name. With `mode=generate` prompts are drawn:
the answer is JSON with the paths of the pictures, as generation tasks there read it. The package finds this file
through an entry point; nothing here is imported without it.
"""
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image as Pil

from diptych.adapters.published import open_model
from diptych.data.images import fit_to_model, read_image, write_image
from diptych.document import Document, Image, Piece, Text
from diptych.engine.engine import generate
from diptych.systems.base import Sampling, System

PLACE = "<image>"  # stands for the next picture in a question
MODES = ("understanding", "generate")


def manifest() -> ModelManifest:
    """What lmms-eval asks its entry points for."""
    return ModelManifest(model_id="diptych", simple_class_path=f"{__name__}.Diptych")


class Diptych(lmms):
    """`batch_size` requests run at once; answers do not depend on it. Other arguments are an error."""

    is_simple = True

    def __init__(self, pretrained: str = "mini", mode: str = "understanding", device: str | None = None,
                 dtype: str = "float32", batch_size: int | str = 1, threads: int | str | None = None,
                 output_dir: str = "lmms-pictures", seed: int | str = 0, max_batch_size: Any = None) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"expected mode {' or '.join(MODES)}, got {mode!r}")
        if threads:
            torch.set_num_threads(int(threads))
        self.mode, self.slots, self.seed, self.folder = mode, int(batch_size), int(seed), Path(output_dir)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.system = open_model(pretrained, device=device, dtype=None if dtype == "stored" else getattr(torch, dtype))

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    # -- requests -----------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers, cut at the first of the strings that a task ends them with."""
        if self.mode == "generate":
            return self._draw(requests)
        answers: dict[int, str] = {}
        settings = [json.dumps(r.args[1], sort_keys=True, default=str) for r in requests]
        for setting in dict.fromkeys(settings):  # those that are sampled alike share forward passes
            numbers = [i for i, own in enumerate(settings) if own == setting]
            options = requests[numbers[0]].args[1]
            documents = [Document((*self._question(requests[i]), Text(role="assistant", target=True))) for i in numbers]
            made = generate(self.system, documents, sampling_of(self.system, options), seeds=self.seed,
                            slots=self.slots, progress="answers")
            texts = [_until(str(d.of(Text)[-1].text), options.get("until")) for d in made]
            answers |= zip(numbers, texts, strict=True)
        return [answers[i] for i in range(len(requests))]

    @torch.no_grad()
    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Log-prob of every continuation as the model's whole answer, and whether it would have said it itself."""
        out = []
        for request in requests:
            wanted = request.args[1]
            text = str(wanted(self._item(request)) if callable(wanted) else wanted).strip()
            question = self._question(request)
            scored = self.system.score([Document((*question, Text(role="assistant", text=text, target=True)))])
            said = generate(self.system, [Document((*question, Text(role="assistant", target=True)))], seeds=self.seed)
            out.append((float(scored.values[0].sum()), said[0].of(Text)[-1].text == text))
        return out

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise ValueError("expected a task of one round, got one of several; fix: choose a task that asks once")

    def _draw(self, requests: Sequence[Instance]) -> list[str]:
        documents = [Document((*self._question(r), Image(target=True))) for r in requests]
        made = generate(self.system, documents, seeds=self.seed, slots=self.slots, progress="drawings")
        self.folder.mkdir(parents=True, exist_ok=True)
        out = []
        for request, document in zip(requests, made, strict=True):
            path = self.folder / f"{request.args[-2]}-{request.args[-3]}.png"
            write_image(document.of(Image)[-1], path)
            out.append(json.dumps({"text": "", "images": [str(path)]}))
        return out

    def _item(self, request: Instance) -> Any:
        number, task, split = request.args[-3:]
        return self.task_dict[task][split][number]

    def _question(self, request: Instance) -> tuple[Piece, ...]:
        """Pictures where the text names their places, or in front of it."""
        text, see = request.args[0], request.args[2]
        pictures = [fit_to_model(_image(p), self.system.config) for p in _flat(see(self._item(request)) if see else ())]
        parts = text.split(PLACE)
        if len(parts) != len(pictures) + 1:
            parts = [*[""] * len(pictures), text.replace(PLACE, "")]
        pieces: list[Piece] = []
        for part, picture in zip(parts, [*pictures, None], strict=True):
            pieces += [Text(text=part.strip())] if part.strip() else []
            pieces += [picture] if picture is not None else []
        return tuple(pieces)


def sampling_of(system: System, options: dict[str, Any]) -> Sampling:
    """A task's options over the model's own way of sampling; without `do_sample` answers are the most likely ones."""
    own = system.default_sampling()
    temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
    top_p = options.get("top_p")
    text = replace(own.text, temperature=temperature, top_p=1.0 if top_p is None else float(top_p),
                   max_tokens=int(options.get("max_new_tokens", own.text.max_tokens)))
    return replace(own, text=text)


def _until(text: str, ends: str | Sequence[str] | None) -> str:
    for end in [ends] if isinstance(ends, str) else ends or ():
        text = text.split(end)[0] if end else text
    return text.strip()


def _flat(found: Any) -> Iterable[Any]:
    """Pictures of one item, which tasks give alone, in a list, or in lists of lists."""
    if isinstance(found, list | tuple):
        for part in found:
            yield from _flat(part)
    elif found is not None:
        yield found


def _image(picture: Any) -> Image:
    if isinstance(picture, str):
        return read_image(picture)
    if not isinstance(picture, Pil.Image):
        raise ValueError(f"expected pictures in a task, got {type(picture).__name__}; fix: choose a task of pictures")
    return Image.from_uint8(np.asarray(picture.convert("RGB")))
