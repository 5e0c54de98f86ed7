"""The published MammothModa2: `llm_model.*` (Qwen3-VL with `gen_embed_tokens`, `gen_head` and `layers.N.gen_mlp`),
`gen_transformer.*` (the renderer, with what it is told through in `time_caption_embed`) and `gen_vae.*` (diffusers).

A folder holds `config.json` and `weights.safetensors`; flow time and velocity are those of this library. The tokenizer
of plans is a file of its own in the release and is not loaded: plans can be drawn and rendered, but not learnt from
pictures.
"""
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from diptych.adapters import autoencoder_kl, qwen3_vl
from diptych.adapters.keys import Rule, expand, to_ours
from diptych.parts.dit_stream import StreamDitConfig
from diptych.parts.qformer import QFormerConfig
from diptych.systems.mammothmoda2 import MammothModa2, MammothModa2Config

# what would change the network, with the one value that is built here
FIXED = {"": {"gen_text_condition_with_answer": False}, "llm_config": {"extra_gen_vocab": True}}
BOTH = ("weight", "bias")
LLM, DIT = "llm_model.", "gen_transformer."
TIME_LIMIT = 1024  # the widest time embedding
QUERY_HEAD = 128  # width of a head of the queries where the config does not say how many there are


def expert_layers(kind: str, depth: int) -> tuple[int, int]:
    """From `moe_type`: "none", "ffn" or "ffn-FIRST:END"."""
    name, _, span = kind.partition("-")
    if name not in ("none", "ffn"):
        raise ValueError(f"expected moe_type none or ffn, with layers behind a dash or without, got {kind!r}")
    if name == "none":
        return 0, 0
    first, _, end = span.partition(":")
    return int(first or 0), int(end or depth)


def rounded(width: int, multiple: int) -> int:
    return multiple * -(-width // multiple)


def generator_config(values: Mapping[str, Any], axes: list[int]) -> StreamDitConfig:
    if values.get("out_channels") not in (None, values["in_channels"]):
        raise ValueError(f"expected as many channels out as in, got {values['out_channels']}")
    width, factor = values["hidden_size"], values.get("ffn_dim_multiplier") or 1
    return StreamDitConfig(
        token_width=values["in_channels"] * values["patch_size"] ** 2, width=width, layers=values["num_layers"],
        refiners=values["num_refiner_layers"], heads=values["num_attention_heads"], kv_heads=values["num_kv_heads"],
        hidden=rounded(int(factor * 4 * width), values["multiple_of"]), axes=(axes[0], axes[1], axes[2]),
        time_width=min(width, TIME_LIMIT), time_scale=values["timestep_scale"], norm_eps=values["norm_eps"])


def config_of(values: Mapping[str, Any]) -> MammothModa2Config:
    """From the contents of `config.json`, which does not state the fixed tokens of a plan."""
    for group, fixed in FIXED.items():
        for key, only in fixed.items():
            found = (values[group] if group else values).get(key, only)
            if found != only:
                raise ValueError(f"expected {key} to be {only!r}, got {found!r}")
    llm, dit, plan = values["llm_config"], values["gen_dit_config"], values["t2i_generation_config"]
    language, start = qwen3_vl.config_of(llm), llm["gen_vocab_start_index"]
    if start != language["vocabulary_size"]:
        raise ValueError(f"expected the vocabulary of codes behind that of words, at {language['vocabulary_size']}, "
                         f"got {start}")
    generator = generator_config(dit, values.get("gen_axes_dim_rope") or dit["axes_dim_rope"])
    queries, paper = values["gen_image_condition_refiner_config"], MammothModa2.paper()
    return MammothModa2Config(
        **language, expert_layers=expert_layers(llm["moe_type"], language["depth"]),
        codes=plan["visual_token_end_id"], code_rows=llm["gen_vocab_size"],  # the release counts codes with that key
        first_code=plan["visual_token_start_id"] - start, row_end=plan["eol_token_id"] - start, plan_codec=None,
        condition=values["gen_condition_mode"], condition_layers=tuple(values["gen_condition_layers"]),
        queries=QFormerConfig(
            width=generator.width, mlp_width=rounded(4 * generator.width, 256), layers=queries["num_layers"],
            heads=queries.get("num_heads") or generator.width // QUERY_HEAD, norm_eps=1e-5,
            queries=queries["num_queries"], cross_every=1, feature_width=language["block"].width, form="gated"),
        generator=generator, codec=autoencoder_kl.config_of(values["gen_vae_config"]), latent_patch=dit["patch_size"],
        latent_sides=paper.latent_sides, picture=paper.picture, sampling=paper.sampling)


def language_rules(c: MammothModa2Config) -> list[Rule]:
    """Words, codes, and the twins, which share the norm of the network beside them."""
    words, layer = f"{LLM}model.language_model.", "trunk.layers.{i}."
    out = [*qwen3_vl.rules(c, LLM), Rule((f"{words}gen_embed_tokens.weight",), "code_embed.weight"),
           Rule((f"{LLM}gen_head.weight",), "code_head.weight")]
    twins = [Rule(tuple(f"{words}layers.{{i}}.gen_mlp.{n}_proj.weight" for n in ("gate", "up")),
                  f"{layer}mlp.1.gate_up.weight", (c.block.hidden,) * 2),
             Rule((f"{words}layers.{{i}}.gen_mlp.down_proj.weight",), f"{layer}mlp.1.down.weight"),
             Rule((f"{words}layers.{{i}}.post_attention_layernorm.weight",), f"{layer}mlp_norm.1.weight")]
    return out + [r for rule in twins for r in expand(rule, i=range(*c.expert_layers))]


def generator_rules(c: StreamDitConfig) -> list[Rule]:
    names = {"x_embedder": "input", "ref_image_patch_embedder": "reference_input", "norm_out.linear_1": "scale",
             "norm_out.linear_2": "output", "time_caption_embed.timestep_embedder.linear_1": "time.mlp.0",
             "time_caption_embed.timestep_embedder.linear_2": "time.mlp.2"}
    out = [Rule((f"{DIT}{t}.{w}",), f"generator.{o}.{w}") for t, o in names.items() for w in BOTH]
    out.append(Rule((f"{DIT}image_index_embedding",), "generator.index"))
    head = c.width // c.heads
    for theirs, ours, count, modulated in (
            ("context_refiner", "condition_refiner", c.refiners, False), ("layers", "blocks", c.layers, True),
            ("ref_image_refiner", "reference_refiner", c.refiners, True),
            ("noise_refiner", "noise_refiner", c.refiners, True)):
        block, own = f"{DIT}{theirs}.{{i}}.", f"generator.{ours}.{{i}}."
        single = {"norm1.norm" if modulated else "norm1": "norm1", "norm2": "norm2", "ffn_norm1": "mlp_norm1",
                  "ffn_norm2": "mlp_norm2", "attn.norm_q": "q_norm", "attn.norm_k": "k_norm", "attn.to_out.0": "out",
                  "feed_forward.linear_2": "mlp.down"}
        rules = [Rule((f"{block}{t}.weight",), f"{own}{o}.weight") for t, o in single.items()]
        rules += [Rule((f"{block}norm1.linear.{w}",), f"{own}modulation.{w}") for w in BOTH if modulated]
        rules += [Rule(tuple(f"{block}attn.to_{p}.weight" for p in "qkv"), f"{own}qkv.weight",
                       (c.heads * head, c.kv_heads * head, c.kv_heads * head)),
                  Rule(tuple(f"{block}feed_forward.linear_{n}.weight" for n in (1, 3)), f"{own}mlp.gate_up.weight",
                       (c.hidden,) * 2)]
        out += [r for rule in rules for r in expand(rule, i=range(count))]
    return out


def condition_rules(c: MammothModa2Config) -> list[Rule]:
    theirs, q = f"{DIT}time_caption_embed.", c.queries
    out = list[Rule]()
    if "text" in c.condition:
        out += [Rule((f"{theirs}caption_embedder.{n}.{w}",), f"conditions.text.{n}.{w}")
                for n in (0, 1) for w in BOTH[:n + 1]]
    if "image" not in c.condition:
        return out
    image, own = f"{theirs}image_embedder.", "conditions.image."
    out += [Rule((f"{image}input_proj.{n}.{w}",), f"{own}project.{n}.{w}") for n in (0, 1) for w in BOTH[:n + 1]]
    out.append(Rule((f"{image}query",), f"{own}queries", shape=(1, q.queries, q.width)))
    block, layer = f"{image}layers.{{i}}.", f"{own}layers.{{i}}."
    rules = [Rule((f"{block}{t}.weight",), f"{layer}{o}.weight")
             for t, o in (("ln_q1", "attention.norm"), ("ln_q2", "cross.norm"), ("ln_ffn", "norm"),
                          ("ffn.linear_2", "mlp.down"))]
    rules.append(Rule(tuple(f"{block}ffn.linear_{n}.weight" for n in (1, 3)), f"{layer}mlp.gate_up.weight",
                      (q.mlp_width,) * 2))
    for t, o in (("self_attn", "attention"), ("cross_attn", "cross")):
        for w in BOTH:
            rules += [Rule((f"{block}{t}.in_proj_{w}",), f"{layer}{o}.{p}.{w}", part=(k, 3))
                      for k, p in enumerate(("query", "key", "value"))]
            rules.append(Rule((f"{block}{t}.out_proj.{w}",), f"{layer}{o}.out.{w}"))
    return out + [r for rule in rules for r in expand(rule, i=range(q.layers))]


def rules(c: MammothModa2Config) -> list[Rule]:
    """How every tensor of the file is called here."""
    return [*language_rules(c), *generator_rules(c.generator), *condition_rules(c),
            *autoencoder_kl.rules(c.codec, "gen_vae.")]


def load(folder: str | Path) -> MammothModa2:
    """A published folder as a system; any tensor that finds no home is an error."""
    folder = Path(folder)
    c = config_of(json.loads((folder / "config.json").read_text()))
    model, theirs = MammothModa2.from_folder(c, folder), load_file(folder / "weights.safetensors")
    tied = c.tie_embeddings
    shapes = {k: v.shape for k, v in model.state_dict().items() if not (tied and k == "head.weight")}
    state, report = to_ours(theirs, rules(c), shapes, (f"{LLM}lm_head.",) if tied else ())
    if report:
        raise ValueError(f"expected the published MammothModa2 layout in {folder}, got {report}")
    model.load_state_dict(state, strict=not tied)
    return model.eval()
