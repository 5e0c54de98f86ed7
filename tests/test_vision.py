import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diptych.parts.positions import sincos_2d
from diptych.parts.vision import Connector, VisionConfig, VisionTransformer, patchify, position_ids, unpatchify

GOLDEN = Path(__file__).parent / "goldens" / "bagel"
SMALL = VisionConfig(width=32, mlp_width=48, num_layers=2, num_heads=4, patch=4, max_side=6)


def subset(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@pytest.fixture()
def small() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(SMALL).eval()


def test_features_equal_the_published_code() -> None:
    weights, golden = load_file(GOLDEN / "ema.safetensors"), load_file(GOLDEN / "golden.safetensors")
    tower = VisionTransformer(VisionConfig.from_published(json.loads((GOLDEN / "vit_config.json").read_text())))
    tower.load_state_dict(subset(weights, "vit_model."), strict=True)
    connector = Connector(48, 64)
    connector.load_state_dict(subset(weights, "connector."), strict=True)
    features = connector(tower(patchify(golden["image_vit"][None], 14)[0], [(3, 4)]))
    torch.testing.assert_close(features, golden["vit_features"], atol=2e-4, rtol=0)


def test_sincos_tables_equal_the_published_ones() -> None:
    weights = load_file(GOLDEN / "ema.safetensors")
    for name, side in (("vit_pos_embed", 5), ("latent_pos_embed", 8)):
        torch.testing.assert_close(sincos_2d(64, side), weights[f"{name}.pos_embed"], atol=1e-6, rtol=0)


def test_paper_size_is_that_of_the_published_tower() -> None:
    with torch.device("meta"):
        model = VisionTransformer(VisionConfig.paper())
    layer = 4 * (1152**2 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    assert sum(p.numel() for p in model.parameters()) == 26 * layer + 588 * 1152 + 1152 + 70**2 * 1152 + 2 * 1152


def test_pack_of_different_pictures_equals_each_alone(small: VisionTransformer) -> None:
    grids = [(2, 3), (4, 4), (6, 1)]
    images = [torch.randn(1, 3, 4 * h, 4 * w) for h, w in grids]
    packed = small(torch.cat([patchify(i, 4)[0] for i in images]), grids)
    alone = torch.cat([small.encode(i)[0] for i in images])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_batch_of_one_size_equals_the_masked_path(small: VisionTransformer) -> None:
    images = torch.randn(3, 3, 8, 12)
    batch = small.encode(images)
    assert batch.shape == (3, 6, 32)
    other = torch.randn(1, 3, 4, 4)  # one more picture of another size switches the fast path off
    packed = small(torch.cat([patchify(images, 4).flatten(0, 1), patchify(other, 4)[0]]), [(2, 3)] * 3 + [(1, 1)])
    torch.testing.assert_close(packed[:18], batch.flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_same_length_but_other_grid_gets_other_positions(small: VisionTransformer) -> None:
    patches = torch.randn(6, 48)
    assert not torch.allclose(small(patches, [(2, 3)]), small(patches, [(3, 2)]), atol=1e-3)


def test_pictures_do_not_see_each_other(small: VisionTransformer) -> None:
    a, b = torch.randn(6, 48), torch.randn(4, 48)
    first = small(torch.cat([a, b]), [(2, 3), (2, 2)])
    second = small(torch.cat([a, b + 1]), [(2, 3), (2, 2)])
    torch.testing.assert_close(first[:6], second[:6])
    assert not torch.allclose(first[6:], second[6:], atol=1e-3)


def test_patchify_order_and_inverse() -> None:
    images = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)
    tokens = patchify(images, 2)
    assert tokens.shape == (2, 6, 12)
    # token 4 is patch row 1, patch column 1: pixel rows 2-3, columns 2-3, channel last
    expected = images[1, :, 2:4, 2:4].permute(1, 2, 0).flatten()
    assert torch.equal(tokens[1, 4], expected)
    assert torch.equal(unpatchify(tokens, 2, (2, 3)), images)


def test_position_ids() -> None:
    assert position_ids((2, 3), 5).tolist() == [0, 1, 2, 5, 6, 7]
    assert position_ids((2, 2), 4, interpolate=True).tolist() == [0, 2, 8, 10]
    assert position_ids((1, 8), 4, interpolate=True).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="at most 4 patches per side, got a grid of 5 x 2"):
        position_ids((5, 2), 4)


def test_gradients_reach_everything(small: VisionTransformer) -> None:
    (small.encode(torch.randn(2, 3, 24, 24)) * torch.randn(32)).sum().backward()
    still = [n for n, p in small.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9]
    assert [n for n in still if not n.endswith("k_proj.bias")] == []  # a bias of all keys cancels in the softmax


def test_errors_name_what_was_expected(small: VisionTransformer) -> None:
    with pytest.raises(ValueError, match=r"shape \(6, 48\).*got \(5, 48\)"):
        small(torch.zeros(5, 48), [(2, 3)])
    with pytest.raises(ValueError, match="multiples of 4, got 9 x 8"):
        small.encode(torch.zeros(1, 3, 9, 8))
    with pytest.raises(ValueError, match="rope to be False"):
        VisionConfig.from_published({"image_size": 70, "patch_size": 14, "rope": True})
    with pytest.raises(ValueError, match="unknown hidden"):
        VisionConfig.from_published({"hidden": 3})
