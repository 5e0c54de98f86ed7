"""Published Emu3 checkpoints (Emu3-Stage1, -Gen, -Chat and -VisionTokenizer), in both layouts and both ways.

    original      two folders: the language model in the names of LLaMA (`model.*`, `lm_head`), and the tokenizer of
                  clips (`encoder.*`, `decoder.*`, `quantize.*`), found as `vision_tokenizer` in the first
    huggingface   `Emu3ForConditionalGeneration`, one folder: `model.text_model.*`, `model.vqmodel.*`, `lm_head`

A folder holds `config.json`, the weights, and optionally `tokenizer.json`. Golden cases are in `emu3_cases`.
"""
import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from diptych.adapters import qwen
from diptych.adapters.janus import read_weights
from diptych.adapters.keys import Rule, to_ours, to_theirs
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

Layout = Literal["original", "huggingface"]
TOKENIZER = "vision_tokenizer"
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
    r"\.(attn(?:_1|\.\d+))\.proj_out\.": r".\1.out_proj.", r"^": "model.vqmodel.",
}
# names that earlier versions of transformers wrote
EARLIER = {r"^text_model\.model\.": "model.text_model.", r"^text_model\.lm_head\.": "lm_head.",
           r"^vqmodel\.": "model.vqmodel."}
COUNTER = "num_batches_tracked"


def renamed(name: str, patterns: Mapping[str, str]) -> str:
    for pattern, other in patterns.items():
        name = re.sub(pattern, other, name)
    return name


def tokenizer_rules(config: VideoTokenizerConfig, layout: Layout = "original") -> list[Rule]:
    """How every tensor of the tokenizer is called here; attention has 1x1 convolutions or matrices."""
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in VideoTokenizer(config).state_dict().items()}

    def rename(ours: str) -> Rule:
        name, shape = renamed(ours, RENAMES), ()
        if layout == "huggingface":
            name = renamed(name, HUGGINGFACE)
            shape = shapes[ours][:2] if re.search(r"\.(\w_proj|out_proj)\.weight$", name) else ()
        return Rule((name,), ours, shape=shape)

    return named(shapes, rename)


def rules(c: Emu3Config, layout: Layout = "original") -> list[Rule]:
    """How every tensor of the language model and of the tokenizer is called here."""
    if not isinstance(c.codec, VideoTokenizerConfig):
        raise ValueError(f"expected a model with a tokenizer of clips, as published, got {type(c.codec).__name__}; "
                         "fix: save it with save_system")
    out = qwen.rules(LanguageConfig(block=c.block, depth=c.depth, vocabulary_size=0))
    if layout == "huggingface":
        out = [replace(r, theirs=tuple(re.sub(r"^model\.", "model.text_model.", t) for t in r.theirs)) for r in out]
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
    the characters that state a size (Qwen's, unless the config knows them)."""
    sizes = values["vq_config"] if tokenizer is None else tokenizer
    if tokenizer is None:
        known, language = values["vocabulary_map"], values["text_config"]
        first = _known(known, VISUAL.format(0))
        ids, spelling = {name: _known(known, token) for name, token in IDS.items()}, spelling or known
    else:
        language, ids = values, {name: values[f"{name}_token_id"] for name in IDS}
        first = values["vocab_size"] - sizes["codebook_size"]
    codec, spelling = tokenizer_config(sizes), spelling or SPELLING
    *digits, times = (_known(spelling, character) for character in SIZE)
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


def published_tokenizer(c: VideoTokenizerConfig, layout: Layout) -> dict[str, Any]:
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


def published_config(model: Emu3, layout: Layout) -> dict[str, Any]:
    """The contents of `config.json`, without the tokenizer's in the original layout."""
    c, b, block = model.config, model.config.block, model.layout.code
    one = [g for g in ((block.opened, block.row_end) if block else ()) if len(g) == 1]
    if b.qkv_bias or b.qk_norm or not b.llama_like or block is None or len(one) != 2 or len(block.end) != 2:
        raise ValueError("expected LLaMA blocks and a grammar with one token each for img, eol, eof and eoi, got "
                         "others; fix: save it with save_system")
    m = model.marks
    ids = {"bos": m.start, "eos": m.end, "boi": m.image_start, "eoi": m.image_end, "img": block.opened[0],
           "eol": block.row_end[0], "eof": block.end[0]}
    language = {"vocab_size": model.first_code + model.values, "hidden_size": b.width, "intermediate_size": b.hidden,
                "num_hidden_layers": c.depth, "num_attention_heads": b.heads, "num_key_value_heads": b.kv_heads,
                "head_dim": b.head_dim, "rms_norm_eps": b.norm_eps, "rope_theta": c.rope_theta, "hidden_act": "silu",
                "max_position_embeddings": POSITIONS, "tie_word_embeddings": False, "pad_token_id": m.end,
                "bos_token_id": m.start, "eos_token_id": m.end}
    if layout == "original":
        return {"model_type": "Emu3", "architectures": ["Emu3ForCausalLM"], **language,
                "image_area": c.picture[0] * c.picture[1], **{f"{name}_token_id": i for name, i in ids.items()}}
    assert isinstance(c.codec, VideoTokenizerConfig)
    known = {} if model.vocabulary is None else model.vocabulary.tokenizer.get_vocab()
    known |= {IDS[name]: i for name, i in ids.items()} | dict(zip(SIZE, (*block.digits, *block.times), strict=True))
    known |= {VISUAL.format(k): model.first_code + k for k in range(model.values)}
    return {"model_type": "emu3", "architectures": ["Emu3ForConditionalGeneration"],
            "text_config": {"model_type": "emu3_text_model", **language},
            "vq_config": published_tokenizer(c.codec, layout), "vocabulary_map": known, "tie_word_embeddings": False}


# -- folders ----------------------------------------------------------------------------------------------------------

def load(folder: str | Path, tokenizer: str | Path | None = None) -> Emu3:
    """A published folder of either layout as a system; any tensor that finds no home is an error. `tokenizer`: the
    folder of that, where it does not lie in the other."""
    folder = Path(folder)
    values, theirs = json.loads((folder / "config.json").read_text()), read_weights(folder)
    own, about, names = folder / "tokenizer.json", None, None
    if own.is_file():
        from tokenizers import Tokenizer

        names = Tokenizer.from_file(str(own))
    layout: Layout = "huggingface" if "text_config" in values else "original"
    if layout == "original":
        beside = folder / TOKENIZER if tokenizer is None else Path(tokenizer)
        about, theirs = json.loads((beside / "config.json").read_text()), theirs | read_weights(beside)
    c = config_of(values, about, spelling=None if names is None else names.get_vocab())
    if names is not None and c.marks is not None:
        marks = [names.id_to_token(i) for i in dataclasses.astuple(c.marks)]
        if None in marks:
            raise ValueError(f"expected the tokens {dataclasses.astuple(c.marks)} in {own}, got {marks}; "
                             "fix: keep the tokenizer of the checkpoint beside it")
        c = replace(c, mark_names=tuple(marks))
    model = Emu3.from_folder(c, folder)
    assert isinstance(model, Emu3)
    convert(model, theirs, layout, folder)
    return model.eval()


def convert(model: Emu3, theirs: Mapping[str, Tensor], layout: Layout, source: object) -> None:
    """Put a published state dict into a model: that of the language model and of the tokenizer together."""
    if layout == "huggingface":
        theirs = {renamed(k, EARLIER): v for k, v in theirs.items()}
    counters = [k for k in theirs if k.endswith(COUNTER)]
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    state, report = to_ours(theirs, rules(model.config, layout), shapes, counters)
    if report:
        raise ValueError(f"expected the {layout} layout of Emu3 in {source}, got {report}")
    model.load_state_dict(state)


def published(model: Emu3, layout: Layout) -> dict[str, Tensor]:
    """All tensors under their published names, with the counters that batch norms keep there."""
    out = to_theirs(model.state_dict(), rules(model.config, layout))
    return out | {k.replace("running_mean", COUNTER): torch.tensor(0) for k in out if k.endswith("running_mean")}


def export(model: Emu3, folder: str | Path, layout: Layout = "original") -> None:
    """Write a model in a published layout, its tokenizer in a folder inside in the original one."""
    folder, tensors, values = Path(folder), published(model, layout), published_config(model, layout)
    if layout == "original":
        assert isinstance(model.config.codec, VideoTokenizerConfig)
        language = {k: v for k, v in tensors.items() if k.startswith(("model.", "lm_head."))}
        _write(folder / TOKENIZER, {k: v for k, v in tensors.items() if k not in language},
               published_tokenizer(model.config.codec, layout))
        tensors = language
    _write(folder, tensors, values)
    model.save_files(folder)


def _write(folder: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".model.safetensors"
    save_file(dict(tensors), temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)  # safetensors makes files that only their owner may read
    temporary.replace(folder / "model.safetensors")
    temporary = folder / ".config.json"
    temporary.write_text(json.dumps(values, indent=1))
    temporary.replace(folder / "config.json")
