from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diptych.parts import stored


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(32, 96, generator=g) * torch.logspace(-4, 2, 32)[:, None]  # rows of very different size
    return {"a.matrix": rows, "a.kernel": torch.randn(8, 16, 3, 3, generator=g), "a.bias": torch.randn(96, generator=g),
            "b.codes": torch.randn(100, 8, generator=g), "b.zero": torch.zeros(4, 64), "b.steps": torch.tensor(7)}


def test_eight_bits_are_as_close_as_their_scale_allows(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(stored.eighth(tensors), tmp_path / "w.safetensors")
    found = stored.read(tmp_path / "w.safetensors")
    assert set(found) == set(tensors)
    for name in ("a.matrix", "a.kernel"):
        rows, back = tensors[name].flatten(1), found[name].float().flatten(1)
        step = rows.abs().amax(1, keepdim=True) / 127
        assert ((rows - back).abs() <= 0.501 * step).all(), "half a step of its own row"
    assert torch.equal(found["b.codes"], tensors["b.codes"].bfloat16()), "short rows stay in half precision"
    assert torch.equal(found["a.bias"], tensors["a.bias"].bfloat16())
    assert not found["b.zero"].any() and found["b.steps"].dtype == torch.int64
    size = (tmp_path / "w.safetensors").stat().st_size
    save_file(stored.half(tensors), tmp_path / "half.safetensors")
    assert size < 0.85 * (tmp_path / "half.safetensors").stat().st_size


def test_a_part_is_read_by_its_prefix(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(stored.eighth(tensors), tmp_path / "w.safetensors")
    part = stored.read(tmp_path / "w.safetensors", "a")
    assert set(part) == {"matrix", "kernel", "bias"}
    assert torch.equal(part["matrix"], stored.read(tmp_path / "w.safetensors")["a.matrix"])


def test_rounding_twice_changes_nothing(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(stored.eighth(tensors), tmp_path / "one.safetensors")
    once = stored.read(tmp_path / "one.safetensors")
    save_file(stored.eighth(once), tmp_path / "two.safetensors")
    twice = stored.read(tmp_path / "two.safetensors")
    for name, value in once.items():
        assert torch.allclose(twice[name].float(), value.float(), rtol=4e-3, atol=0), name
