"""Folders in the layout of Hugging Face: `transformers` reads what is exported here, and its own folders load here."""
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from published_folders import WHOLE
from torch import Tensor

from diptych.adapters import published
from diptych.adapters.convert import export, export_folder, import_folder
from diptych.adapters.tensors import Tensors, weights_in
from diptych.parts.interleave import Page
from diptych.systems.io import load_system
from diptych.systems.packed import Packed
from diptych.systems.works import Reader

CLASSES = {"emu3": "Emu3ForConditionalGeneration", "janus": "JanusForConditionalGeneration"}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def transformers() -> Iterator[Any]:
    module = pytest.importorskip("transformers", reason="transformers is the reference")
    before = module.logging.get_verbosity()
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    yield module
    module.logging.set_verbosity(before)


def ours(folder: Path) -> Packed:
    model = published.load(folder)
    assert isinstance(model, Packed)
    return model


@torch.no_grad()
def logits_of(model: Packed, ids: list[int]) -> Tensor:
    """(n, vocabulary) of a text."""
    w = model.writer(Reader())
    w.text(ids, open=False, close=False)
    page = Page.of([[w]])
    return model.head(model.trunk(model.states(page, None, None), page.tokens, model.mask)[0])


@torch.no_grad()
def assert_alike(model: Packed, theirs: Any) -> None:
    """The same text logits, and pictures decoded from codes."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (12,), generator=generator)
    expected = theirs(input_ids=ids[None], use_cache=False).logits[0]
    assert expected.std() > 0.05
    torch.testing.assert_close(logits_of(model, ids.tolist()), expected, atol=TOLERANCE, rtol=0)
    codes, vq = torch.randint(0, 48, (1, 4, 4), generator=generator), theirs.model.vqmodel
    pixels = model.codec.decode(codes)  # type: ignore[operator]
    vq.quantize.quant_state_dims = [4, 4]  # Janus has its codes flat
    other = vq.decode(codes if type(model).__name__ == "Emu3" else codes.flatten(1))
    torch.testing.assert_close(pixels, other, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", CLASSES)
def test_transformers_reads_what_is_exported(family: str, transformers: Any, tmp_path: Path) -> None:
    model = ours(WHOLE[family])
    export(model, tmp_path, layout="huggingface")
    theirs, info = getattr(transformers, CLASSES[family]).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_alike(model, theirs.eval())


@pytest.mark.parametrize("family", CLASSES)
def test_what_transformers_saves_is_read(family: str, transformers: Any, tmp_path: Path) -> None:
    export(ours(WHOLE[family]), tmp_path / "sizes", layout="huggingface")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "sizes")
    torch.manual_seed(0)
    theirs = getattr(transformers, CLASSES[family])(config).eval()
    for name, value in theirs.state_dict().items():
        if value.is_floating_point() and "running" not in name:
            value.add_(0.1 * torch.randn_like(value))
    theirs.save_pretrained(tmp_path / "theirs")
    assert published.find_layout(tmp_path / "theirs") == (family, "huggingface")
    model = ours(tmp_path / "theirs")
    assert_alike(model, theirs)
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "back")
    saved, back = (dict(Tensors({"": weights_in(tmp_path / name)})) for name in ("theirs", "back"))
    written = {k for k in weights_in(tmp_path / "sizes") for k in Tensors({"": [k]})}
    assert saved.keys() == back.keys() == written and all(saved[k].equal(back[k]) for k in saved)
    same = json.loads((tmp_path / "back" / "config.json").read_text())
    assert same == json.loads((tmp_path / "theirs" / "config.json").read_text())
    again = load_system(tmp_path / "ours")
    assert isinstance(again, Packed) and torch.equal(again.embed.weight, model.embed.weight)
