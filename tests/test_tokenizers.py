"""Picture tokenizers: the published outputs, one wrong weight noticed, other sizes read off their files, gradients."""
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych.adapters import infinity, parity, show_o, tokenflow, tokenizers, var, vila_u
from diptych.adapters.keys import Rule, to_theirs
from diptych.parts.quantize import (
    CodebookConfig,
    JointConfig,
    LossWeights,
    MixConfig,
    ResidualConfig,
    SignConfig,
    VectorConfig,
)
from diptych.parts.semantic import DualTokenizer, DualTokenizerConfig
from diptych.parts.towers import Tower, TowerConfig
from diptych.parts.vq import VQTokenizer, VQTokenizerConfig
from diptych.parts.vqgan import PyramidConfig

GOLDENS = Path(__file__).parent / "goldens"
FAMILIES = {  # a weight that some case must notice, and the file it is in
    "llamagen-vq16": ("weights", "post_quant_conv.weight"),
    "var": ("vae", "quantize.quant_resi.qresi_ls.2.weight"),
    "show-o": ("magvitv2", "encoder.quant_conv.bias"),
    "infinity": ("vae", "encoder.mid.block_2.norm1.norm.weight"),
    "vila-u": ("weights", "rqtransformer.pos_emb_d"),
    "unifork": ("weights", "model.vision_tower.vision_tower.rqvaesiglip.post_quant_conv.bias"),
    "tokenflow": ("tokenizer", "decoder_vqkd.blocks.1.attn.v_bias"),
}
# 8 pixels per cell, unlike levels, attention at two of them
SIDE = PyramidConfig(channels=32, channel_mult=(1, 2, 1, 3), blocks=(1, 2, 1, 1), attention=(2, 3))
BACK = replace(SIDE, blocks=(2, 1, 3, 1), attention=(3,))
TOWER = TowerConfig(width=24, mlp_width=40, layers=2, heads=3, patch=8, side=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_outputs_are_reproduced(family: str) -> None:
    cases = parity.run(family, GOLDENS / family)
    assert len(cases) >= 7 and len({case.name for case in cases}) == len(cases)
    assert [case for case in cases if not case.passed] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_wrong_weight_fails(family: str, tmp_path: Path) -> None:
    file, name = FAMILIES[family]
    shutil.copytree(GOLDENS / family, tmp_path / family)
    weights = load_file(tmp_path / family / f"{file}.safetensors")
    weights[name].view(-1)[1] += 0.5
    save_file(weights, tmp_path / family / f"{file}.safetensors")
    assert any(not case.passed for case in parity.run(family, tmp_path / family))


def test_a_tensor_without_a_home_is_an_error(tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / "llamagen-vq16", tmp_path / "vq")
    weights = load_file(tmp_path / "vq" / "weights.safetensors")
    save_file({**weights, "encoder.extra.weight": torch.zeros(1)}, tmp_path / "vq" / "weights.safetensors")
    with pytest.raises(ValueError, match=r"1 unexpected \(encoder.extra.weight\)"):
        tokenizers.load_llamagen(tmp_path / "vq")
    del weights["quant_conv.bias"]
    save_file(weights, tmp_path / "vq" / "weights.safetensors")
    with pytest.raises(ValueError, match="1 missing"):
        tokenizers.load_llamagen(tmp_path / "vq")


# -- other sizes and options -------------------------------------------------------------------------------------------


def returns(module: torch.nn.Module, rules: list[Rule], make: Callable[[Mapping[str, Tensor]], Any]) -> None:
    """Tensors under their published names give the same config, and one name each."""
    theirs = to_theirs(module.state_dict(), rules)
    assert make(theirs) == module.config
    fused = sum(rule.part[0] for rule in rules if rule.part[1] == 3) // 3
    assert len(theirs) == len(rules) - 2 * fused


@pytest.mark.parametrize("share", [0, 1, 3])
@pytest.mark.parametrize("ratio", [0.3, 0.0])
def test_var_of_other_sizes(share: int, ratio: float) -> None:
    values = {"quant_resi": -ratio, "share_quant_resi": share, "v_patch_nums": [1, 3], "vocab_size": 20, "ch": 32,
              "z_channels": 6, "using_znorm": True, "beta": 0.5, "quant_conv_ks": 1}
    mix = MixConfig(count=share or 2, ratio=ratio) if ratio else None
    quantizer = ResidualConfig(codebook=CodebookConfig(values=20, width=6, norm="lookup"), scales=((1, 1), (3, 3)),
                               mix=mix, weights=LossWeights(commitment=0.5))
    model = VQTokenizer(VQTokenizerConfig(encoder=SIDE, decoder=BACK, latent_channels=6, quantizer=quantizer))
    returns(model, var.tokenizer_rules(model.config, share), lambda theirs: var.tokenizer_config(values, theirs))


def test_show_o_of_other_sizes() -> None:
    values = {"encoder": {"ch": 32, "z_channels": 7}, "decoder": {"ch": 32}, "codebook_dim": 4, "beta": 0.5,
              "entropy_multiplier": 0.2, "commit_loss_multiplier": 0.4}
    weights = LossWeights(codebook=0.2, commitment=0.4, entropy=0.2)
    quantizer = VectorConfig(codebook=SignConfig(width=4), weights=weights)
    model = VQTokenizer(VQTokenizerConfig(encoder=replace(SIDE, attention=()), decoder=BACK, latent_channels=7,
                                          quantizer=quantizer))
    returns(model, show_o.tokenizer_rules(model.config), lambda theirs: show_o.tokenizer_config(values, theirs))


def test_infinity_of_other_sizes() -> None:
    values = {"vae": {"codebook_dim": 5, "base_ch": 32}, "schedule": [[1, 1, 1], [1, 2, 3]]}
    quantizer = ResidualConfig(codebook=SignConfig(width=5, unit=True, packed=False), scales=((1, 1), (2, 3)),
                               up="bilinear", compare="step", weights=LossWeights(codebook=0.0, commitment=0.25))
    model = VQTokenizer(VQTokenizerConfig(encoder=replace(SIDE, attention=(), mid_attention=False), decoder=BACK,
                                          in_kernel=0, out_kernel=0, quantizer=quantizer))
    returns(model, infinity.tokenizer_rules(model.config), lambda theirs: infinity.tokenizer_config(values, theirs))
    with pytest.raises(ValueError, match="video schedules"):
        infinity.tokenizer_config({**values, "schedule": [[2, 1, 1]]}, {})


def test_vila_u_with_codebooks_of_their_own() -> None:
    values = {"rqvaesiglip": {"n_embed": 11, "embed_dim": 24, "decay": 0.9, "restart_unused_codes": True,
                              "code_shape": [3, 3, 2], "shared_codebook": False,
                              "ddconfig": {"ch": 32, "z_channels": 9}},
              "siglip_vision": {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "patch_size": 8,
                                "num_attention_heads": 3, "image_size": 24, "layer_norm_eps": 1e-6,
                                "hidden_act": "gelu_pytorch_tanh"}}
    theirs = load_file(GOLDENS / "vila-u" / "weights.safetensors")
    quantizer = ResidualConfig(codebook=CodebookConfig(values=11, width=24, norm="none", decay=0.9, restart=True),
                               depth=2, shared=False, weights=LossWeights(codebook=0.0, commitment=1.0))
    model = VQTokenizer(VQTokenizerConfig(encoder=TOWER, decoder=BACK, latent_channels=9, in_kernel=0,
                                          quantizer=quantizer))
    rules = vila_u.tokenizer_rules(model.config)
    returns(model, rules, lambda theirs: vila_u.tokenizer_config(values, theirs))
    theirs = to_theirs(model.state_dict(), rules)
    for d in range(2):  # the row of padding
        theirs[f"quantizer.codebooks.{d}.weight"] = torch.cat((theirs[f"quantizer.codebooks.{d}.weight"],
                                                               torch.zeros(1, 24)))
    own = vila_u.make_tokenizer(values, theirs, "memory")
    pixels = torch.randn(1, 3, 24, 16)
    codes = own.encode(pixels)
    assert codes.shape == (1, 3, 2, 2) and torch.equal(codes, model.encode(pixels))
    torch.testing.assert_close(own.code_vectors(codes).sum(-2).movedim(-1, 1), own.quantizer.lookup(codes))


def test_a_wider_decoder_is_read_off_the_tensors() -> None:
    values = json.loads((GOLDENS / "tokenflow" / "config.json").read_text())["tokenizer"]
    config = tokenflow.tokenizer_config(values, load_file(GOLDENS / "tokenflow" / "tokenizer.safetensors"))
    config = replace(config, decoder=replace(config.decoder, channels=64, blocks=(5, 5, 5)))
    model = DualTokenizer(config)
    returns(model, [r for r in tokenflow.tokenizer_rules(config)],
            lambda theirs: tokenflow.tokenizer_config(values, theirs))
    with pytest.raises(ValueError, match="expected teacher clipb_224"):
        tokenflow.tokenizer_config({**values, "teacher": "siglip_384"}, {})


def test_literals_of_the_public_code_can_be_restated(tmp_path: Path) -> None:
    sampling, scale = vila_u.literals(tmp_path)
    assert (sampling.top_k, sampling.top_p, scale) == (900, 0.96, 3.0)
    (tmp_path / "README.md").write_text("top_k literal 900 -> 7; logits = u + 2.5 (c - u), top_k, top_p 0.8 (kept).")
    sampling, scale = vila_u.literals(tmp_path)
    assert (sampling.top_k, sampling.top_p, scale) == (7, 0.8, 2.5)


# -- the parts themselves ----------------------------------------------------------------------------------------------


def test_paper_size_is_vq16() -> None:
    with torch.device("meta"):
        model = VQTokenizer(VQTokenizerConfig.paper())
    assert sum(p.numel() for p in model.parameters()) == 71_883_403  # "72M" of LlamaGen's table
    assert model.config.downsample == 16 and model.layout(384, 384).count == 576


def test_there_and_back_with_gradients_everywhere() -> None:
    torch.manual_seed(0)
    model = VQTokenizer(VQTokenizerConfig.small())
    pixels = torch.randn(2, 3, 16, 32)
    codes = model.encode(pixels)
    assert codes.shape == (2, 2, 4) and codes.dtype == torch.int64 and model.layout(16, 32).count == 8
    assert model.code_vectors(codes[0, 0, 0]).shape == (8,)
    rebuilt, quantized = model(pixels)
    torch.testing.assert_close(rebuilt, model.decode(codes))
    torch.testing.assert_close(model.encode(pixels[1:]), codes[1:])
    (rebuilt.square().mean() + sum(quantized.losses.values())).backward()
    learnt = [(name, p) for name, p in model.named_parameters() if p.requires_grad]  # code vectors are averages
    idle = [name for name, p in learnt if p.grad is None or not p.grad.abs().sum() > 0]
    assert all(name.endswith(".k.bias") for name in idle)  # a constant added to every key moves nothing
    with pytest.raises(ValueError, match=r"multiples of 8, got \(1, 3, 20, 16\); fix: resize"):
        model.encode(torch.zeros(1, 3, 20, 16))
    with pytest.raises(ValueError, match="one stride, got 8 and 4 pixels"):
        VQTokenizerConfig(encoder=SIDE, decoder=PyramidConfig(channel_mult=(1, 1, 1), blocks=(1, 1, 1), attention=()))


def dual() -> DualTokenizer:
    parts = (CodebookConfig(values=30, width=6), CodebookConfig(values=30, width=4))
    quantizer = ResidualConfig(codebook=JointConfig(parts=parts), scales=((1, 1), (2, 2)), compare="step")
    return DualTokenizer(DualTokenizerConfig(
        semantic_encoder=TOWER, semantic_decoder=replace(TOWER, patch=1, class_token=True), encoder=SIDE, decoder=BACK,
        quantizer=quantizer, latent_channels=12, feature_width=7))


def test_neither_decoder_sees_the_half_of_the_other() -> None:
    torch.manual_seed(0)
    model, pixels = dual().eval(), torch.randn(2, 3, 16, 16)
    views = model(pixels)
    assert views.pixels.shape == (2, 3, 16, 16) and views.features.shape == (2, 4, 7)
    assert views.quantized.codes.shape == (2, 5)
    torch.testing.assert_close(model.decode(views.quantized.codes), views.pixels)
    for seen, other in ((slice(0, 6), slice(6, 10)), (slice(6, 10), slice(0, 6))):
        vectors = views.quantized.vectors.detach().clone()
        vectors[:, other] += 1
        if seen.start == 0:
            torch.testing.assert_close(model.semantics(vectors), views.features)
            assert not torch.allclose(model.decode_vectors(vectors), views.pixels)
        else:
            torch.testing.assert_close(model.decode_vectors(vectors), views.pixels)
            assert not torch.allclose(model.semantics(vectors), views.features)
    (views.pixels.square().mean() + views.features.square().mean() + sum(views.quantized.losses.values())).backward()
    learnt = [(name, p) for name, p in model.named_parameters() if p.requires_grad]  # code vectors are averages
    idle = [name for name, p in learnt if p.grad is None or not p.grad.abs().sum() > 0]
    assert all(name.endswith((".k.bias", ".k_proj.bias")) for name in idle)
    with pytest.raises(ValueError, match="expected a joint codebook of two parts"):
        replace(model.config, quantizer=ResidualConfig(depth=2))



def test_registers_and_the_class_token_beside_them_have_no_place() -> None:
    tower = Tower(replace(TOWER, class_token=True, registers=4))
    assert tower.positions.shape == (9, 24) and tower.config.prefix == 5
    x = torch.randn(2, 3, 24, 24)
    states, cells = tower.encode(x), tower(x)
    assert states.shape == (2, 14, 24) and cells.shape == (2, 24, 3, 3)
    torch.testing.assert_close(cells.flatten(2).transpose(1, 2), states[:, 5:])
    with torch.no_grad():
        tower.registers[:, 0] += 5
    assert not torch.allclose(tower(x), cells)
    with pytest.raises(ValueError, match="expected registers beside a class token only, got 4"):
        replace(TOWER, registers=4)


def test_scaled_blocks_start_as_nothing_and_are_plain_ones_at_1() -> None:
    torch.manual_seed(0)
    plain, scaled = Tower(TOWER), Tower(replace(TOWER, layer_scale=True))
    assert scaled.load_state_dict(plain.state_dict(), strict=False).missing_keys == [
        f"layers.{i}.scale{n}" for i in (0, 1) for n in (1, 2)]
    x = torch.randn(1, 3, 24, 24)
    first = plain.patch_embedding(x).flatten(2).transpose(1, 2) + plain.positions
    torch.testing.assert_close(scaled.encode(x), first, atol=1e-3, rtol=0)
    with torch.no_grad():
        for name, p in scaled.named_parameters():
            if "scale" in name:
                p.fill_(1.0)
    torch.testing.assert_close(scaled(x), plain(x))
    with pytest.raises(ValueError, match="norms behind or with scales"):
        replace(TOWER, layer_scale=True, norm_behind=True)


def test_a_tower_resizes_its_table() -> None:
    torch.manual_seed(0)
    tower = Tower(replace(TOWER, class_token=True))
    with torch.no_grad():
        tower.positions[1:] = 2.0
    torch.testing.assert_close(tower.table((5, 2)), torch.full((10, 24), 2.0))
    with torch.no_grad():
        tower.positions[1:] = torch.randn(9, 24)
    assert torch.equal(tower.table((3, 3)), tower.positions[1:])
    offset = Tower(replace(TOWER, class_token=True, table_offset=0.1))
    offset.load_state_dict(tower.state_dict())
    assert not torch.allclose(offset.table((5, 5)), tower.table((5, 5)), atol=1e-3)
    features = tower(torch.randn(2, 3, 40, 16))
    assert features.shape == (2, 24, 5, 2)
    first = tower(torch.zeros(1, 3, 24, 24))
    with torch.no_grad():
        tower.class_token.add_(1.0)
    assert not torch.allclose(tower(torch.zeros(1, 3, 24, 24)), first)  # cells see the class token
    with pytest.raises(ValueError, match="24 channels behind a tower"):
        TOWER.make_encoder(3, 8)


def test_pyramid_errors() -> None:
    with pytest.raises(ValueError, match="blocks for each of 5 levels, got 2"):
        PyramidConfig(blocks=(1, 1))
    with pytest.raises(ValueError, match="attention at levels 0 to 4"):
        PyramidConfig(attention=(5,))
    with pytest.raises(ValueError, match="multiples of norm_groups=32"):
        PyramidConfig(channels=48)
