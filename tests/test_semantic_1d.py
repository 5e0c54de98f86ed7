"""Causal 1-D semantic codes: what each query sees, both branches, both heads, losses, and the published outputs."""
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diptych.adapters import parity, seed
from diptych.adapters.keys import to_theirs
from diptych.parts.qformer import QFormer, QFormerConfig
from diptych.parts.quantize import CodebookConfig, LossWeights, VectorConfig
from diptych.parts.semantic_1d import SemanticTokenizer, SemanticTokenizerConfig
from diptych.parts.towers import TowerConfig
from diptych.parts.vision import VisionConfig

GOLDEN = Path(__file__).parent / "goldens" / "seed"
TOWER = TowerConfig(width=24, mlp_width=40, layers=2, heads=3, patch=8, side=2, gelu="exact", class_token=True)
QUERIES = QFormerConfig(width=24, mlp_width=40, layers=3, heads=2, queries=6, feature_width=24, causal=True)
REVERSE = replace(QUERIES, queries=1, causal=False)
CODES = VectorConfig(codebook=CodebookConfig(values=20, width=5, norm="none"),
                     weights=LossWeights(codebook=0.25, commitment=1.0))
SMALL = SemanticTokenizerConfig(vision=TOWER, qformer=QUERIES, quantizer=CODES, semantic_layers=1, image_layers=2,
                                heads=4, narrow=(8, 4), embedding_width=7)


def build(**changes: Any) -> SemanticTokenizer:
    torch.manual_seed(0)
    return SemanticTokenizer(replace(SMALL, **changes)).eval()


@cache
def small() -> SemanticTokenizer:
    return build()


def pictures() -> torch.Tensor:
    """A ramp from black to white, and the other way round."""
    ramp = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    return torch.cat((ramp, -ramp))


# -- the Q-Former -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_a_query_sees_those_before_it() -> None:
    torch.manual_seed(0)
    model = QFormer(QUERIES)
    features = torch.randn(1, 5, 24)
    before, free = model(features), model(features, causal=False)
    model.queries[3] = torch.randn(24)
    after = model(features)
    assert torch.equal(after[:, :3], before[:, :3]) and not torch.isclose(after[:, 3:], before[:, 3:]).all(-1).any()
    assert not torch.isclose(model(features, causal=False), free).all(-1).any()
    torch.testing.assert_close(model(features, 4), after[:, :4])  # a prefix needs no more
    assert not torch.allclose(model(features, 4, causal=False), after[:, :4])


@torch.no_grad()
def test_only_some_layers_look() -> None:
    model = QFormer(QUERIES)
    assert [layer.cross is not None for layer in model.layers] == [True, False, True]  # type: ignore[union-attr]
    one, two = (model(torch.full((1, 2, 24), v) * torch.arange(24)) for v in (1.0, -1.0))
    assert not torch.allclose(one, two)
    with pytest.raises(ValueError, match="1 to 6 queries, got 7"):
        model(torch.zeros(1, 2, 24), 7)
    with pytest.raises(ValueError, match=r"shape \(b, m, 24\), got \(1, 2, 23\)"):
        model(torch.zeros(1, 2, 23))


# -- the tokenizer ----------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_codes_and_embeddings() -> None:
    model, x = small(), pictures()
    codes = model.encode(x)
    assert codes.shape == (2, 6) and model.layout().count == 6 and model.layout().values == 20
    found = model(model.states(x))
    assert torch.equal(found.quantized.codes[:, 0], codes) and found.states.shape == (2, 6, 24)
    torch.testing.assert_close(model.decode(codes), found.embedding)
    assert found.embedding.shape == (2, 7) and not torch.equal(codes[0], codes[1])
    rows = model.code_vectors(codes)
    z = model.code_map(found.states)[:, :, 0].transpose(1, 2)
    distance = (z[:, :, None] - model.quantizer.codebook.weight).square().sum(-1)
    assert torch.equal(distance.argmin(-1), codes) and torch.equal(rows, model.quantizer.codebook.weight[codes])
    with pytest.raises(ValueError, match=r"codes of shape \(b, 6\), got \(2, 5\)"):
        model.decode(codes[:, :5])
    with pytest.raises(ValueError, match="multiples of 8"):
        model.encode(torch.zeros(1, 3, 16, 12))


def test_pictures_are_scaled_and_normalised() -> None:
    model, x = small(), torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1).expand(1, 3, 24, 8)
    read = model.prepare(x)
    c = model.config
    assert read.shape == (1, 3, 16, 16)
    wanted = torch.tensor([(v - m) / s for v, m, s in zip((0.0, 0.5, 1.0), c.mean, c.std, strict=True)])
    torch.testing.assert_close(read, wanted[:, None, None].expand(1, 3, 16, 16), atol=1e-5, rtol=0)


@torch.no_grad()
def test_every_code_reaches_the_embedding_and_its_place_matters() -> None:
    for model in (small(), build(narrow=(), reverse=REVERSE)):
        codes = torch.arange(6)[None]
        usual = model.decode(codes)
        for i in range(6):
            other = codes.clone()
            other[0, i] = 19
            assert not torch.allclose(model.decode(other), usual)
        assert not torch.allclose(model.decode(codes.flip(1)), usual)


def test_losses_by_hand() -> None:
    model, target = small(), torch.randn(2, 7, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    found = model(model.states(pictures()))
    terms = model.losses(found, target)
    z, rows = model.code_map(found.states)[:, :, 0].transpose(1, 2), model.code_vectors(found.quantized.codes[:, 0])
    torch.testing.assert_close(terms["quantize"], (1 + 0.25) * (z - rows).square().mean())
    torch.testing.assert_close(terms["image"], (found.embedding - target).square().mean())
    assert found.semantics is not None
    a, b = (x / x.norm(dim=-1, keepdim=True) for x in (found.semantics, found.states))
    torch.testing.assert_close(terms["recon"], 1 - (a * b).sum(-1).mean())
    terms["recon"].backward()  # reaches the queries through the codes alone, and not the other branch
    assert all(p.grad is None for p in model.image.parameters()) and model.qformer.queries.grad is not None


def test_a_codebook_may_follow() -> None:
    codes = replace(CODES, codebook=replace(CODES.codebook, decay=0.9, restart=True))
    model = build(quantizer=codes, semantic_layers=0, vision=VisionConfig(width=24, mlp_width=40, num_layers=1,
                                                                           num_heads=2, patch=8, max_side=2))
    rows = model.quantizer.codebook.weight.clone()
    found = model(model.states(pictures()), torch.Generator().manual_seed(0))
    assert not torch.equal(rows, model.quantizer.codebook.weight) and found.semantics is None
    assert set(model.losses(found, torch.zeros(2, 7))) == {"quantize", "image"}
    with pytest.raises(ValueError, match="semantic branch"):
        model.semantics(found.states)


@pytest.mark.parametrize(("changes", "message"), [
    ({"reverse": REVERSE}, "either narrow or reverse"),
    ({"narrow": (), "reverse": QUERIES}, "reverse Q-Former of one query"),
    ({"qformer": replace(QUERIES, feature_width=23)}, "that of the tower, 24, got 23"),
])
def test_what_does_not_fit_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)
    with pytest.raises(ValueError, match="multiple of heads=5"):
        replace(QUERIES, heads=5)


def test_the_published_size() -> None:
    """ViT-g without its last block, the Q-Former without its parts for text, four blocks per branch, by arithmetic."""
    with torch.device("meta"):
        model = SemanticTokenizer(SemanticTokenizerConfig())
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    w, h = 1408, 6144
    assert sizes["vision"] == 39 * (4 * (w * w + w) + 2 * w * h + h + w + 4 * w) + 3 * 14 * 14 * w + w + 258 * w
    d = 768
    own, cross, mlp = 4 * (d * d + d) + 2 * d, 2 * (d * d + d) + 2 * (w * d + d) + 2 * d, 8 * d * d + 5 * d + 2 * d
    assert sizes["qformer"] == 12 * (own + mlp) + 6 * cross + 32 * d + 2 * d
    assert sizes["quantizer"] == 8192 * 32 and sizes["project"] == 1024 * 1025


# -- the published tokenizer ------------------------------------------------------------------------------------------

def test_every_golden_case() -> None:
    cases = parity.run("seed", GOLDEN)
    assert [c.name for c in cases if not c.passed] == []
    assert len(cases) == 17 and max(c.absolute for c in cases) < 2e-5


@pytest.mark.parametrize(("file", "key", "hit"), [
    ("eva_vit", "blocks.1.attn.v_bias", "encode.vit_features"),
    ("seed_quantizer", "Qformer.bert.encoder.layer.3.output_query.dense.bias", "encode_16_queries.qformer"),
    ("seed_quantizer", "blocks_image.1.mlp.fc1.weight", "decode.image_embeds"),
    ("seed_quantizer", "blocks.0.attn.qkv.bias", "train.loss_recon_s"),
])
def test_one_wrong_weight_is_noticed(file: str, key: str, hit: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "seed"))
    tensors = load_file(folder / f"{file}.safetensors")
    tensors[key] = tensors[key] + torch.randn(tensors[key].shape, generator=torch.Generator().manual_seed(0)) / 4
    save_file(tensors, folder / f"{file}.safetensors")
    assert hit in {c.name for c in parity.run("seed", folder) if not c.passed}


@pytest.mark.parametrize(("queries", "released", "legacy"), [(6, True, True), (32, False, False)])
def test_other_sizes_and_options_are_read_off_the_files(queries: int, released: bool, legacy: bool) -> None:
    qformer = replace(QUERIES, queries=queries, causal=queries == 32)
    weights = LossWeights(codebook=0.3, commitment=1.0) if legacy else LossWeights(codebook=1.0, commitment=0.3)
    config = replace(SMALL, qformer=qformer, quantizer=replace(CODES, weights=weights), image_layers=2,
                     semantic_layers=2 if legacy else 0, narrow=SMALL.narrow if released else (),
                     reverse=None if released else REVERSE)
    theirs = to_theirs(SemanticTokenizer(config).state_dict(), seed.tokenizer_rules(config))
    assert ("image_down.2.weight" in theirs) == released == ("Reverse_Qformer.bert.embeddings.LayerNorm.bias"
                                                             not in theirs)
    values = {"quantizer": {"num_query_token": queries, "cross_attention_freq": 2, "codebook_embed_dim": 5,
                            "n_embed": 20, "recon_s": legacy, "blocks_for_image": True, "decode_depth": 2,
                            "use_qformer_image": not released, "image_features_dim": 7},
              "vit": {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3,
                      "mlp_ratio": 40 / 24, "qkv_bias": True, "norm_eps": 1e-6},
              "bert": {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40,
                       "hidden_act": "gelu", "layer_norm_eps": 1e-12},
              "decoder_block_heads": 4, "vq_beta": 0.3, "legacy": legacy}
    assert seed.tokenizer_config(values, theirs) == config
    with pytest.raises(ValueError, match="hidden_act of the Q-Former to be 'gelu', got 'relu'"):
        seed.tokenizer_config({**values, "bert": {**values["bert"], "hidden_act": "relu"}}, theirs)
