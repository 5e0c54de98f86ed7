"""Published Emu3 checkpoints (Emu3-Stage1, -Gen, -Chat and -VisionTokenizer), in both layouts and both ways.

    original      two folders: the language model in the names of LLaMA (`model.*`, `lm_head`), and the tokenizer of
                  clips (`encoder.*`, `decoder.*`, `quantize.*`), found as `vision_tokenizer` in the first; or one with
                  both configs in one file, `llm.safetensors` and `vision_tokenizer.safetensors`
    huggingface   one folder, as `Emu3ForConditionalGeneration` is saved: `text_model.*`, `vqmodel.*`

A folder holds `config.json`, the weights, and optionally `tokenizer.json`. Golden cases are in `emu3_cases`.
"""
import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch

from diptych.adapters import qwen
from diptych.adapters.keys import Rule
from diptych.adapters.published import Checkpoint, Layout, Written, build, has_type, need, others
from diptych.adapters.tensors import Tensors, need_weights, read_json
from diptych.adapters.tokenizers import named
from diptych.parts.blocks import BlockConfig
from diptych.parts.grammar import Grammar
from diptych.parts.interleave import Marks
from diptych.parts.language import LanguageConfig
from diptych.parts.pictures import size_of_area
from diptych.parts.quantize import CodebookConfig, VectorConfig
from diptych.parts.video_codec import VideoTokenizer, VideoTokenizerConfig
from diptych.parts.vqgan import PyramidConfig
from diptych.systems.emu3 import CHAT, MARK_NAMES, NEGATIVE, SIZE, Emu3, Emu3Config

Naming = Literal["original", "huggingface"]
TOKENIZER = "vision_tokenizer"  # the tokenizer's folder, file or section
PREFIX = f"{TOKENIZER}."  # in front of its tensors in the original layout, where they have a file of their own
IDS = {"bos": MARK_NAMES[0], "eos": MARK_NAMES[1], "boi": MARK_NAMES[2], "eoi": MARK_NAMES[3],
       "img": "<|image token|>", "eol": "<|extra_200|>", "eof": "<|extra_201|>"}  # names of the ids in a config
VISUAL = "<|visual token {:06d}|>"
SPELLING = {**{str(d): 15 + d for d in range(10)}, "*": 9}  # Qwen's ids of the characters that state a size
POSITIONS = 9216  # what published configs state
# what would change the network, with the values that are built here
FIXED = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "tie_word_embeddings": (False,),
         "rope_scaling": (None, {"rope_type": "default"})}
FIXED_TOKENIZER = {"double_z": (False,), "num_attention_heads": (1,)}
# names of the tokenizer's sizes: the authors' and those of `vq_config`
VQ_SIZES = {"ch": "base_channels", "ch_mult": "channel_multiplier", "z_channels": "latent_channels",
            "double_z": "double_latent"}
# patterns in ours -> the authors', tried in order on the whole name
RENAMES = {
    r"^(decoder\..*norm\d?(?:_out)?)\.norm\.": r"\1.norm_layer.", r"^(decoder\..*)\.scale\.": r"\1.conv_y.",
    r"^(decoder\..*)\.shift\.": r"\1.conv_b.",
    r"^shorten\.": "encoder.", r"^lengthen\.": "decoder.",
    r"^((?:en|de)coder)\.resize\.(\d+)\.": r"\1.time_conv.\2.conv.conv.",
    r"^((?:en|de)coder)\.blocks\.(\d+)\.(conv\d)\.": r"\1.time_res_stack.\2.\3.conv.",
    r"^((?:en|de)coder)\.blocks\.(\d+)\.(norm\d)\.(mean|var)$": r"\1.time_res_stack.\2.\3.running_\4",
    r"^((?:en|de)coder)\.blocks\.": r"\1.time_res_stack.",
    r"^((?:post_)?quant_conv)\.": r"\1.conv.", r"^quantizer\.codebook\.": "quantize.embedding.",
}
# the authors' -> those of Hugging Face
HUGGINGFACE = {
    r"^((?:en|de)coder)\.mid\.": r"\1.middle_block.", r"^encoder\.down\.": "encoder.down_block.down.",
    r"^decoder\.up\.": "decoder.up_block.up.", r"\.attn_1\.norm\.": ".attn_norm.",
    r"\.attn\.(\d+)\.norm\.": r".attn_norms.\1.", r"\.(attn(?:_1|\.\d+))\.([qkv])\.": r".\1.\2_proj.",
    r"\.(attn(?:_1|\.\d+))\.proj_out\.": r".\1.out_proj.", r"^": "vqmodel.",
}
# names that transformers has in memory, and files that hold its state dict -> those of its files
MEMORY = {r"^model\.text_model\.": "text_model.model.", r"^lm_head\.": "text_model.lm_head.",
          r"^model\.vqmodel\.": "vqmodel."}
COUNTER = "num_batches_tracked"  # of batch norms, which nothing here reads
WHAT = "the tokenizer of pictures and clips (BAAI/Emu3-VisionTokenizer)"


def renamed(name: str, patterns: Mapping[str, str]) -> str:
    for pattern, other in patterns.items():
        name = re.sub(pattern, other, name)
    return name


def tokenizer_rules(config: VideoTokenizerConfig, layout: Naming = "original") -> list[Rule]:
    """How every tensor of the tokenizer is called here; attention has 1x1 convolutions or matrices."""
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in VideoTokenizer(config).state_dict().items()}

    def rename(ours: str) -> Rule:
        name = renamed(ours, RENAMES)
        if layout == "original":
            return Rule((PREFIX + name,), ours)
        name = renamed(name, HUGGINGFACE)
        return Rule((name,), ours, shape=shapes[ours][:2] if name.endswith("_proj.weight") else ())

    return named(shapes, rename)


def rules(c: Emu3Config, layout: Naming = "original") -> list[Rule]:
    """How every tensor of the language model and of the tokenizer is called here."""
    if not isinstance(c.codec, VideoTokenizerConfig):
        raise ValueError(f"expected a model with a tokenizer of clips, as published, got {type(c.codec).__name__}; "
                         "fix: save it with save_system")
    out = qwen.rules(LanguageConfig(block=c.block, depth=c.depth, vocabulary_size=0))
    if layout == "huggingface":
        out = [replace(r, theirs=tuple(f"text_model.{t}" for t in r.theirs)) for r in out]
    return out + [replace(r, ours=f"codec.{r.ours}") for r in tokenizer_rules(c.codec, layout)]


# -- configs ----------------------------------------------------------------------------------------------------------

def _check(values: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]], where: str) -> None:
    for key, known in fixed.items():
        if key in values and values[key] not in known:
            raise ValueError(f"expected {key} of {where} to be {known[0]!r}, got {values[key]!r}")


def _known(ids: Mapping[str, int], token: str) -> int:
    if token not in ids:
        raise ValueError(f"expected a token {token!r} in the vocabulary of Emu3, got none; fix: keep the published "
                         "vocabulary_map or tokenizer.json")
    return ids[token]


def tokenizer_config(values: Mapping[str, Any]) -> VideoTokenizerConfig:
    """From the contents of the tokenizer's `config.json`, or of `vq_config`."""
    values = {ours: values[theirs] for ours, theirs in VQ_SIZES.items() if theirs in values} | dict(values)
    _check(values, FIXED_TOKENIZER, "the tokenizer")
    frames, width = values["temporal_downsample_factor"], values["embed_dim"]
    if frames & (frames - 1) or values["z_channels"] != width or values["in_channels"] != values["out_channels"]:
        raise ValueError("expected a temporal_downsample_factor that is a power of 2, z_channels as embed_dim and "
                         f"in_channels as out_channels, got {frames}, {values['z_channels']} and {width}, "
                         f"{values['in_channels']} and {values['out_channels']}")
    mult, blocks = tuple(values["ch_mult"]), values["num_res_blocks"]
    side = PyramidConfig(channels=values["ch"], channel_mult=mult, blocks=(blocks,) * len(mult),
                         attention=tuple(values["attn_resolutions"]))  # levels, in spite of the name
    return VideoTokenizerConfig(
        encoder=side, decoder=replace(side, blocks=(blocks + 1,) * len(mult), guide=width),
        halvings=int(math.log2(frames)), blocks=blocks, image_channels=values["in_channels"],
        quantizer=VectorConfig(codebook=CodebookConfig(values=values["codebook_size"], width=width, norm="none")))


def config_of(values: Mapping[str, Any], tokenizer: Mapping[str, Any] | None = None, *,
              spelling: Mapping[str, int] | None = None) -> Emu3Config:
    """From the contents of `config.json` and, in the original layout, of that of the tokenizer. `spelling`: the ids of
    the characters that state a size, where the config does not tell (Qwen's, unless given)."""
    sizes = values["vq_config"] if tokenizer is None else tokenizer
    if tokenizer is None:
        known, language = values["vocabulary_map"], values["text_config"]
        first = _known(known, VISUAL.format(0))
        ids = {name: _known(known, token) for name, token in IDS.items()}
    else:
        language, ids, known = values, {name: values[f"{name}_token_id"] for name in IDS}, values.get("spelling")
        first = values["vocab_size"] - sizes["codebook_size"]
    codec, characters = tokenizer_config(sizes), known or spelling or SPELLING
    *digits, times = (_known(characters, character) for character in SIZE)
    if language["vocab_size"] != first + sizes["codebook_size"]:
        raise ValueError(f"expected {sizes['codebook_size']} codes at the end of the vocabulary, got vocab_size "
                         f"{language['vocab_size']} and the first of them at {first}")
    _check(language, FIXED, "the language model")
    heads, width, paper = language["num_attention_heads"], language["hidden_size"], Emu3.paper()
    rope = language.get("rope_parameters") or {}  # transformers 5; before, rope_theta stood beside the rest
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"expected plain rotary positions, got rope_type {rope['rope_type']!r}")
    block = BlockConfig(width=width, heads=heads, kv_heads=language.get("num_key_value_heads") or heads,
                        head_dim=language.get("head_dim") or width // heads, hidden=language["intermediate_size"],
                        qkv_bias=False, norm_eps=language["rms_norm_eps"])
    area = language.get("image_area", paper.picture[0] * paper.picture[1])
    return Emu3Config(
        block=block, depth=language["num_hidden_layers"], first_code=first, codec=codec,
        rope_theta=float(rope.get("rope_theta") or language.get("rope_theta") or paper.rope_theta),
        marks=Marks(ids["bos"], ids["eos"], ids["boi"], ids["eoi"]), turns=CHAT, negative=NEGATIVE,
        grammar=Grammar(start=(ids["boi"],), digits=tuple(digits), times=(times,), opened=(ids["img"],),
                        row_end=(ids["eol"],), end=(ids["eof"], ids["eoi"])),
        picture=size_of_area(1, 1, area, codec.downsample), sampling=paper.sampling)


def published_tokenizer(c: VideoTokenizerConfig, layout: Naming) -> dict[str, Any]:
    """The way back: the contents of the tokenizer's `config.json`, or of `vq_config`."""
    side = c.encoder
    values = {"codebook_size": getattr(c.quantizer.codebook, "values", 0),
              "embed_dim": c.quantizer.width, "z_channels": c.quantizer.width, "double_z": False,
              "in_channels": c.image_channels, "out_channels": c.image_channels,
              "temporal_downsample_factor": c.frames, "ch": side.channels, "ch_mult": list(side.channel_mult),
              "num_res_blocks": c.blocks, "attn_resolutions": list(side.attention)}
    if tokenizer_config(values) != c:
        raise ValueError("expected a tokenizer that the published layout can state (32 norm groups, as many blocks per "
                         "level as over time, a plain codebook), got another; fix: save it with save_system")
    if layout == "original":
        return {"model_type": "Emu3VisionVQ", "architectures": ["Emu3VisionVQModel"], **values, "dropout": 0.0}
    values = {VQ_SIZES.get(k, k): v for k, v in values.items()}
    return {"model_type": "emu3_vqgan", **values, "hidden_size": side.channels * side.channel_mult[-1],
            "num_attention_heads": 1}


def published_config(model: Emu3, layout: Naming) -> dict[str, Any]:
    """The contents of `config.json`, without the tokenizer's in the original layout."""
    c, b, block = model.config, model.config.block, model.layout.code
    one, area = [g for g in ((block.opened, block.row_end) if block else ()) if len(g) == 1], math.prod(c.picture)
    fits = {"block": b.llama_like and not b.qkv_bias and not b.qk_norm,
            "grammar": block is not None and len(one) == 2 and len(block.end) == 2,
            "picture": size_of_area(1, 1, area, c.codec.downsample) == c.picture}
    if wrong := [name for name, fine in fits.items() if not fine]:
        raise ValueError(f"expected a config that the published layout can state, got another {', '.join(wrong)}; "
                         "fix: save it with save_system")
    assert block is not None
    spelling = dict(zip(SIZE, (*block.digits, *block.times), strict=True))
    m = model.marks
    ids = {"bos": m.start, "eos": m.end, "boi": m.image_start, "eoi": m.image_end, "img": block.opened[0],
           "eol": block.row_end[0], "eof": block.end[0]}
    language = {"vocab_size": model.first_code + model.values, "hidden_size": b.width, "intermediate_size": b.hidden,
                "num_hidden_layers": c.depth, "num_attention_heads": b.heads, "num_key_value_heads": b.kv_heads,
                "head_dim": b.head_dim, "rms_norm_eps": b.norm_eps, "rope_theta": c.rope_theta, "hidden_act": "silu",
                "max_position_embeddings": POSITIONS, "tie_word_embeddings": False, "pad_token_id": m.end,
                "bos_token_id": m.start, "eos_token_id": m.end, "image_area": area}
    if layout == "original":
        return {"model_type": "Emu3", "architectures": ["Emu3ForCausalLM"], **language, "spelling": spelling,
                **{f"{name}_token_id": i for name, i in ids.items()}}
    assert isinstance(c.codec, VideoTokenizerConfig)
    known = {} if model.vocabulary is None else model.vocabulary.tokenizer.get_vocab()
    known |= {IDS[name]: i for name, i in ids.items()} | spelling
    known |= {VISUAL.format(k): model.first_code + k for k in range(model.values)}
    return {"model_type": "emu3", "architectures": ["Emu3ForConditionalGeneration"],
            "text_config": {"model_type": "emu3_text_model", **language},
            "vq_config": published_tokenizer(c.codec, layout), "vocabulary_map": known, "tie_word_embeddings": False}


# -- folders ----------------------------------------------------------------------------------------------------------

def load(folder: str | Path, tokenizer: str | Path | None = None) -> Emu3:
    """A published folder of either layout as a system; the tokenizer lies there too, or in `tokenizer`."""
    folder = Path(folder)
    parts = {} if tokenizer is None else {"tokenizer": Path(tokenizer)}
    return cast(Emu3, build(read(folder, parts), folder, dtype=torch.float32)[0])


def read(folder: Path, parts: Mapping[str, Path], *, spelling: Mapping[str, int] | None = None) -> Checkpoint:
    """`spelling`: as in `config_of`; that of the folder's `tokenizer.json`, unless given."""
    values, about, apart = read_json(folder / "config.json"), None, dict[str, Path]()
    if "text_config" in values:
        tensors = Tensors({"": need_weights(folder)})
    elif TOKENIZER in values:
        values, about = values["llm"], values[TOKENIZER]
        tensors = Tensors({"": need_weights(folder, ("llm",)), PREFIX: need_weights(folder, (TOKENIZER,))})
    else:
        home = need(folder, parts, "tokenizer", WHAT, TOKENIZER)
        about, apart = read_json(home / "config.json"), {TOKENIZER: home}
        tensors = Tensors({"": need_weights(folder), PREFIX: need_weights(home)})
    names = _tokens(folder / "tokenizer.json")
    c = config_of(values, about, spelling=spelling or names)
    if names and c.marks is not None:
        at, marks = {i: name for name, i in names.items()}, dataclasses.astuple(c.marks)
        if lacking := [i for i in marks if i not in at]:
            raise ValueError(f"expected the tokens {marks} in {folder / 'tokenizer.json'}, got none at {lacking}; "
                             "fix: keep the tokenizer of the checkpoint beside it")
        c = replace(c, mark_names=tuple(at[i] for i in marks))
    there = {renamed(name, MEMORY): name for name in tensors} if about is None else {}
    own = [replace(rule, theirs=tuple(there.get(t, t) for t in rule.theirs))
           for rule in rules(c, "original" if about else "huggingface")]
    return Checkpoint(cls=Emu3, config=c, tensors=tensors, rules=own, configs=others(folder, apart), apart=apart,
                      ignore=tuple(name for name in tensors if name.endswith(COUNTER)))


def _tokens(path: Path) -> dict[str, int] | None:
    """The ids of a `tokenizer.json`, if there is one."""
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path)).get_vocab()


def write(model: Emu3, layout: Naming) -> Written:
    own, values = rules(model.config, layout), published_config(model, layout)
    counters = [t.replace("running_mean", COUNTER) for rule in own for t in rule.theirs if t.endswith("running_mean")]
    configs, files = {"config.json": values}, {"model.safetensors": ""}
    if layout == "original":
        assert isinstance(model.config.codec, VideoTokenizerConfig)
        configs[f"{TOKENIZER}/config.json"] = published_tokenizer(model.config.codec, layout)
        files[f"{TOKENIZER}/model.safetensors"] = PREFIX
    return Written(configs=configs, rules=own, files=files, tensors={name: torch.tensor(0) for name in counters})


def _finds(folder: Path) -> bool:
    path = folder / "config.json"
    return has_type("Emu3", folder) or (path.is_file() and {"llm", TOKENIZER} <= read_json(path).keys())


LAYOUTS = {
    "original": Layout(about="config.json of model_type Emu3, its weights, and the tokenizer's in vision_tokenizer/",
                       finds=_finds, read=read, write=partial(write, layout="original"), parts={"tokenizer": WHAT}),
    "huggingface": Layout(about="config.json of model_type emu3, and its weights", finds=partial(has_type, "emu3"),
                          read=read, write=partial(write, layout="huggingface"))}
