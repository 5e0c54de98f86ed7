"""Folders of published checkpoints for tests: golden ones as they are, and made of those the forms of releases."""
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych.adapters import published
from diptych.adapters.convert import export

GOLDENS = Path(__file__).parent / "goldens"
# golden folders that are whole checkpoints, by family
WHOLE = {name: GOLDENS / name for name in ("bagel", "blip3-o", "emu3", "harmon", "janus", "show-o", "unipic2",
                                           "vargpt")}


def copy_of(family: str, folder: Path) -> Path:
    """A golden folder without its cases, to be changed."""
    shutil.copytree(GOLDENS / family, folder, ignore=shutil.ignore_patterns("golden*"))
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def _part(folder: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any], *, weights: str = "model",
          config: str = "config", shards: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{config}.json").write_text(json.dumps(values))
    if shards == 1 and tensors:
        save_file(dict(tensors), folder / f"{weights}.safetensors")
    homes: dict[str, str] = {}
    for i in range(shards if shards > 1 else 0):
        name = f"{weights}-{i + 1:05d}-of-{shards:05d}.safetensors"
        own = {k: tensors[k] for k in sorted(tensors)[i::shards]}
        save_file(own, folder / name)
        homes |= dict.fromkeys(own, name)
    if homes:
        (folder / f"{weights}.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))


def _emu3(folder: Path) -> None:
    """Two folders, one in the other; the counters of batch norms have counted."""
    about, source = json.loads((WHOLE["emu3"] / "config.json").read_text()), WHOLE["emu3"]
    _part(folder, load_file(source / "llm.safetensors"), about["llm"] | {"model_type": "Emu3"}, shards=3)
    codec = load_file(source / "vision_tokenizer.safetensors")
    counted = {k: torch.tensor(7) for k in codec if k.endswith("num_batches_tracked")}
    _part(folder / "vision_tokenizer", codec | counted, about["vision_tokenizer"])
    assert counted


def _huggingface(family: str) -> Callable[[Path], None]:
    """One file of half precision, in which counters have counted."""
    def make(folder: Path) -> None:
        export(published.load(WHOLE[family]), folder, layout="huggingface")
        file = folder / "model.safetensors"
        save_file({k: v.half() if v.is_floating_point() else v + 7 for k, v in load_file(file).items()}, file)
    return make


def _unipic2(folder: Path) -> None:
    """A diffusers folder, with the transformer in shards."""
    about = json.loads((WHOLE["unipic2"] / "config.json").read_text())
    for part, name, shards in (("transformer", "diffusion_pytorch_model", 2), ("vae", "diffusion_pytorch_model", 1),
                               ("conditioner", "model", 1), ("qwen2_5_vl", "model", 1)):
        tensors = load_file(WHOLE["unipic2"] / f"{part}.safetensors")
        _part(folder / part, tensors, about[part], weights=name, shards=shards)
    _part(folder / "scheduler", {}, about["scheduler"], config="scheduler_config")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3KontextPipeline"}))
    (folder / "qwen2_5_vl" / "generation_config.json").write_text("{}")


def _mmada(folder: Path) -> None:
    """With the tokenizer of Show-o's golden folder, which has as many codes."""
    copy_of("mmada", folder)
    (folder / "tokenizer").mkdir()
    values = json.loads((WHOLE["show-o"] / "config.json").read_text())
    _part(folder / "tokenizer", load_file(WHOLE["show-o"] / "magvitv2.safetensors"), values)


def _show_o(folder: Path) -> None:
    copy_of("show-o", folder)
    (folder / "tokenizer").mkdir()
    (folder / "magvitv2.safetensors").rename(folder / "tokenizer" / "model.safetensors")
    shutil.copy(folder / "config.json", folder / "tokenizer")


# name -> (family, layout, what makes it)
MADE: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "emu3, released": ("emu3", "original", _emu3),
    "emu3, huggingface": ("emu3", "huggingface", _huggingface("emu3")),
    "janus, huggingface": ("janus", "huggingface", _huggingface("janus")),
    "mmada": ("mmada", "original", _mmada),
    "show-o, apart": ("show-o", "original", _show_o),
    "unipic2, released": ("unipic2", "original", _unipic2),
}
# of those, the ones with a folder inside that may be elsewhere: (part, its place)
APART = {"emu3, released": ("tokenizer", "vision_tokenizer"), "mmada": ("tokenizer", "tokenizer"),
         "show-o, apart": ("tokenizer", "tokenizer"), "unipic2, released": ("qwen2_5_vl", "qwen2_5_vl")}
