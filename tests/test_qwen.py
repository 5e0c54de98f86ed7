import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diptych.adapters import qwen
from diptych.adapters.keys import to_theirs
from diptych.parts.blocks import BlockConfig
from diptych.parts.cache import Context
from diptych.parts.language import LanguageConfig, LanguageModel

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
VARIANTS = {"qwen2": {}, "qwen2-tied": {"tie_word_embeddings": True}, "qwen3": {"head_dim": 12},
            "qwen3-tied": {"head_dim": 8, "tie_word_embeddings": True, "num_key_value_heads": 4}}
IDS = torch.randint(0, 97, (3, 11), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module", params=VARIANTS)
def reference(request: pytest.FixtureRequest) -> Any:
    """A random model of transformers, every norm and bias away from its initial value."""
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    kind = request.param.partition("-")[0].title()
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **rope, **VARIANTS[request.param]})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def ours(reference: Any) -> LanguageModel:
    return qwen.convert(reference.state_dict(), qwen.config_of(reference.config.to_dict()))


def random_model(**changes: Any) -> LanguageModel:
    block = BlockConfig(width=32, heads=4, kv_heads=2, head_dim=8, hidden=48, **changes)
    torch.manual_seed(0)
    model = LanguageModel(LanguageConfig(block=block, depth=2, vocabulary_size=97))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    return model


@torch.no_grad()
def test_logits_equal_those_of_transformers(reference: Any) -> None:
    model = ours(reference)
    assert (model.head.weight is model.embed.weight) == reference.config.tie_word_embeddings
    theirs = reference(IDS).logits
    assert theirs.abs().max() > 1  # not a comparison of zeros
    torch.testing.assert_close(model(IDS), theirs, atol=1e-5, rtol=1e-5)


def test_round_trip_is_bit_equal(reference: Any, tmp_path: Path) -> None:
    model = ours(reference)
    theirs, back = reference.state_dict(), to_theirs(model.state_dict(), qwen.rules(model.config))
    tied = {"lm_head.weight"} if model.config.tie_embeddings else set()
    assert set(back) == set(theirs) - tied
    assert all(torch.equal(back[k], theirs[k]) for k in back)
    qwen.export(model, tmp_path)
    again = qwen.load(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


@torch.no_grad()
def test_transformers_reads_what_we_export(reference: Any, tmp_path: Path) -> None:
    qwen.export(ours(reference), tmp_path)
    again = type(reference).from_pretrained(tmp_path)
    torch.testing.assert_close(again(IDS).logits, reference(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{"qkv_bias": True}, {"qkv_bias": False, "qk_norm": True}])
@torch.no_grad()
def test_cached_equals_uncached(changes: dict[str, bool]) -> None:
    model = random_model(**changes)
    full = model(IDS)
    contexts = [Context() for _ in IDS]
    first = model.read(contexts, IDS[:, :4].tolist())
    torch.testing.assert_close(first, full[:, 3], atol=1e-5, rtol=1e-5)
    for t in range(4, 11):
        torch.testing.assert_close(model.read(contexts, IDS[:, t : t + 1].tolist()), full[:, t], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_decoding_prompts_of_several_lengths_together() -> None:
    model = random_model()
    prompts = [IDS[0, :3].tolist(), IDS[1].tolist(), IDS[2, :1].tolist()]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    assert model.decode(prompts, max_tokens=6) == expected
    end = expected[1][2]  # that row stops at its first `end`, the others go on until theirs
    cut = [e[: e.index(end)] if end in e else e for e in expected]
    assert model.decode(prompts, max_tokens=6, end=end) == cut
    assert model.decode(prompts, max_tokens=2, choose=lambda logits: int(logits.argmin())) != [e[:2] for e in expected]


def test_loss_is_the_mean_over_next_tokens() -> None:
    model = random_model()
    logits = model(IDS).log_softmax(-1)
    each = -torch.stack([logits[b, t, IDS[b, t + 1]] for b in range(3) for t in range(10)])
    torch.testing.assert_close(model.loss(IDS), each.mean())
    labels = torch.full_like(IDS, -100)
    labels[1, 5] = IDS[1, 5]
    torch.testing.assert_close(model.loss(IDS, labels), -logits[1, 4, IDS[1, 5]])
    model.loss(IDS).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_shards_and_errors(tmp_path: Path) -> None:
    model = random_model()
    theirs = to_theirs(model.state_dict(), qwen.rules(model.config))
    (tmp_path / "config.json").write_text(json.dumps(qwen.published_config(model.config)))
    names = sorted(theirs)
    weight_map = {}
    for n, part in enumerate((names[:9], names[9:])):
        file = f"model-{n + 1:05d}-of-00002.safetensors"
        save_file({k: theirs[k] for k in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with torch.no_grad():
        assert torch.equal(qwen.load(tmp_path)(IDS), model(IDS))
    with pytest.raises(ValueError, match=r"1 missing \(model.norm.weight\); 1 unexpected \(other\)"):
        qwen.convert({k: v for k, v in theirs.items() if k != "model.norm.weight"} | {"other": IDS}, model.config)
    values = qwen.published_config(model.config)
    for key, bad in (("model_type", "llama"), ("use_sliding_window", True), ("rope_scaling", {"factor": 2}),
                     ("rope_parameters", {"rope_type": "yarn"})):
        with pytest.raises(ValueError, match="expected"):
            qwen.config_of(values | {key: bad})
    with pytest.raises(FileNotFoundError, match="config.json"):
        qwen.load(tmp_path / "gone")
    with pytest.raises(ValueError, match="at least one id"):
        model.read([Context()], [[]])
