"""Dense Qwen2, Qwen2.5 and Qwen3 checkpoints of Hugging Face: a folder with `config.json` and safetensors.

Both are the same trunk: Qwen2 has biases on queries, keys and values, Qwen3 normalises queries and keys instead.
"""
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych.adapters.keys import Rule, expand, to_ours, to_theirs
from diptych.parts.blocks import BlockConfig
from diptych.parts.language import LanguageConfig, LanguageModel

KINDS = ("qwen2", "qwen3")
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# settings that would change the network, with the one value that is built here
FIXED = {"hidden_act": "silu", "use_sliding_window": False, "rope_scaling": None}


def config_of(values: Mapping[str, Any]) -> LanguageConfig:
    """From the contents of `config.json`."""
    kind = values.get("model_type")
    if kind not in KINDS:
        raise ValueError(f"expected model_type to be one of {', '.join(KINDS)}, got {kind!r}")
    for key, only in FIXED.items():
        if values.get(key, only) != only:
            raise ValueError(f"expected {key} to be {only!r}, got {values[key]!r}")
    if kind == "qwen3" and values.get("attention_bias", False):
        raise ValueError("expected a Qwen3 without attention_bias, got one with it")
    rope = values.get("rope_parameters") or {}  # transformers 5; before, rope_theta stood beside the rest
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"expected plain rotary positions, got rope_type {rope['rope_type']!r}")
    heads = values["num_attention_heads"]
    block = BlockConfig(width=values["hidden_size"], heads=heads, kv_heads=values.get("num_key_value_heads") or heads,
                        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
                        hidden=values["intermediate_size"], qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3",
                        norm_eps=values["rms_norm_eps"])
    return LanguageConfig(block=block, depth=values["num_hidden_layers"], vocabulary_size=values["vocab_size"],
                          rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or 1e4),
                          tie_embeddings=bool(values.get("tie_word_embeddings", False)))


def published_config(c: LanguageConfig) -> dict[str, Any]:
    """The way back: the contents of `config.json`."""
    b = c.block
    if b.qkv_bias == b.qk_norm or not b.llama_like:
        raise ValueError(f"expected a block of Qwen2 (qkv_bias) or Qwen3 (qk_norm), got qkv_bias {b.qkv_bias}, "
                         f"qk_norm {b.qk_norm}, norm {b.norm}, mlp {b.mlp}")
    kind = "qwen3" if b.qk_norm else "qwen2"
    if kind == "qwen2" and b.heads * b.head_dim != b.width:
        raise ValueError(f"expected heads * head_dim = width in a Qwen2, got {b.heads} * {b.head_dim} and {b.width}")
    return {"architectures": [f"{kind.title()}ForCausalLM"], "model_type": kind, "vocab_size": c.vocabulary_size,
            "hidden_size": b.width, "intermediate_size": b.hidden, "num_hidden_layers": c.depth,
            "num_attention_heads": b.heads, "num_key_value_heads": b.kv_heads, "head_dim": b.head_dim,
            "rms_norm_eps": b.norm_eps, "rope_theta": c.rope_theta, "tie_word_embeddings": c.tie_embeddings,
            "hidden_act": "silu", "attention_bias": False}


def rules(c: LanguageConfig) -> list[Rule]:
    b = c.block
    qkv = tuple(n * b.head_dim for n in (b.heads, b.kv_heads, b.kv_heads))
    layer, ours = "model.layers.{i}.", "trunk.layers.{i}."
    per_layer = [
        Rule((f"{layer}input_layernorm.weight",), f"{ours}attention_norm.0.weight"),
        Rule((f"{layer}post_attention_layernorm.weight",), f"{ours}mlp_norm.0.weight"),
        Rule((f"{layer}self_attn.o_proj.weight",), f"{ours}attention.0.out.weight"),
        Rule(tuple(f"{layer}mlp.{n}_proj.weight" for n in ("gate", "up")), f"{ours}mlp.0.gate_up.weight",
             (b.hidden,) * 2),
        Rule((f"{layer}mlp.down_proj.weight",), f"{ours}mlp.0.down.weight"),
        *(Rule(tuple(f"{layer}self_attn.{p}_proj.{w}" for p in "qkv"), f"{ours}attention.0.qkv.{w}", qkv)
          for w in ("weight", "bias") if w == "weight" or b.qkv_bias),
        *(Rule((f"{layer}self_attn.{p}_norm.weight",), f"{ours}attention.0.{p}_norm.weight")
          for p in "qk" if b.qk_norm),
    ]
    out = [Rule(("model.embed_tokens.weight",), "embed.weight"), Rule(("model.norm.weight",), "trunk.norm.0.weight")]
    if not c.tie_embeddings:
        out.append(Rule(("lm_head.weight",), "head.weight"))
    return out + [r for rule in per_layer for r in expand(rule, i=range(c.depth))]


def convert(theirs: Mapping[str, Tensor], c: LanguageConfig) -> LanguageModel:
    """A state dict of `Qwen2ForCausalLM` or `Qwen3ForCausalLM` as a model; a tensor without a home is an error."""
    model = LanguageModel(c)
    shapes = {k: v.shape for k, v in model.state_dict().items() if not (c.tie_embeddings and k == "head.weight")}
    state, report = to_ours(theirs, rules(c), shapes, ("lm_head.",) if c.tie_embeddings else ())
    if report:
        raise ValueError(f"expected the published Qwen layout, got {report}")
    model.load_state_dict(state, strict=not c.tie_embeddings)
    return model.eval()


def load(folder: str | Path) -> LanguageModel:
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"expected a checkpoint with {CONFIG} in {folder}, got none; fix: download it there")
    files = [WEIGHTS]
    if (folder / INDEX).is_file():  # large checkpoints come in shards
        files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    theirs: dict[str, Tensor] = {}
    for name in files:
        theirs |= load_file(folder / name)
    return convert(theirs, config_of(json.loads((folder / CONFIG).read_text())))


def export(model: LanguageModel, folder: str | Path) -> None:
    """Write a folder that `transformers` (and `load`) reads."""
    folder = Path(folder)
    about = published_config(model.config)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{WEIGHTS}"
    save_file(to_theirs(model.state_dict(), rules(model.config)), temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)  # safetensors makes files that only their owner may read
    temporary.replace(folder / WEIGHTS)
    temporary = folder / f".{CONFIG}"
    temporary.write_text(json.dumps(about, indent=1))
    temporary.replace(folder / CONFIG)
