"""VILA-U's published vision tower: SigLIP, residual quantizer, decoder (`rqvaesiglip`), depth transformer
(`rqtransformer`). UniFork keeps the same tower inside its language model's file.

All codebooks are stored, though they may be one table, and each with one more row: padding, which is no code.
"""
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diptych.adapters.cases import Case
from diptych.adapters.keys import Rule
from diptych.adapters.tokenizers import TOLERANCE, compare, named, place, pyramid, residual, tensor_names
from diptych.objectives.next_token import TokenSampling, choose, log_probs
from diptych.parts.depth import DepthConfig, DepthTransformer
from diptych.parts.quantize import CodebookConfig, LossWeights, ResidualConfig
from diptych.parts.towers import TowerConfig
from diptych.parts.vq import VQTokenizer, VQTokenizerConfig

SIGLIP = "siglip_model.vision_model."
UNUSED = ("siglip_model.logit_", "logit_", SIGLIP + "post_layernorm.", SIGLIP + "head.", "siglip_model.text_model.")
TOP_K, TOP_P, SCALE = 900, 0.96, 3.0  # the public code's literals


def tokenizer_config(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> VQTokenizerConfig:
    """From the sections `rqvaesiglip` and `siglip_vision` of a config and the tensors of `rqvaesiglip`."""
    rq, vit = values["rqvaesiglip"], values["siglip_vision"]
    if vit["hidden_act"] != "gelu_pytorch_tanh":
        raise ValueError(f"expected hidden_act gelu_pytorch_tanh, got {vit['hidden_act']}")
    # the features are those that enter the last block
    tower = TowerConfig(width=vit["hidden_size"], mlp_width=vit["intermediate_size"],
                        layers=vit["num_hidden_layers"] - 1, heads=vit["num_attention_heads"],
                        patch=vit["patch_size"], side=vit["image_size"] // vit["patch_size"],
                        norm_eps=vit["layer_norm_eps"])
    book = CodebookConfig(values=rq["n_embed"], width=rq["embed_dim"], norm="none", decay=rq["decay"],
                          restart=rq["restart_unused_codes"])
    quantizer = ResidualConfig(codebook=book, depth=rq["code_shape"][-1], shared=rq["shared_codebook"],
                               weights=LossWeights(codebook=0.0, commitment=1.0))
    return VQTokenizerConfig(encoder=tower, decoder=pyramid(tensors, "decoder.", rq["ddconfig"]["ch"]), in_kernel=0,
                             latent_channels=rq["ddconfig"]["z_channels"], quantizer=quantizer)


def tokenizer_rules(config: VQTokenizerConfig) -> list[Rule]:
    moved = {r"^encoder\.patch_embedding\.": SIGLIP + "embeddings.patch_embedding.",
             r"^encoder\.positions$": SIGLIP + "embeddings.position_embedding.weight",
             r"^encoder\.layers\.": SIGLIP + "encoder.layers.",
             r"^(quantizer\.codebooks\.\d+)\.count$": r"\1.cluster_size_ema",
             r"^(quantizer\.codebooks\.\d+)\.total$": r"\1.embed_ema"}

    def rename(ours: str) -> str:
        for pattern, theirs in moved.items():
            ours = re.sub(pattern, theirs, ours)
        return ours
    return named(tensor_names(lambda: VQTokenizer(config)), rename)


def make_tokenizer(values: Mapping[str, Any], tensors: Mapping[str, Tensor], source: object) -> VQTokenizer:
    """From the config's sections and the tensors of `rqvaesiglip` (names without that prefix)."""
    config = tokenizer_config(values, tensors)
    model = VQTokenizer(config)
    last = f"{SIGLIP}encoder.layers.{values['siglip_vision']['num_hidden_layers'] - 1}."
    copies = tuple(f"quantizer.codebooks.{d}." for d in range(1, values["rqvaesiglip"]["code_shape"][-1]))
    rows = {k: v[:-1] for k, v in tensors.items() if re.fullmatch(r"quantizer\.codebooks\.\d+\.weight", k)}
    place(model, {**tensors, **rows}, tokenizer_rules(config), source,
          (*UNUSED, last, *(copies if values["rqvaesiglip"]["shared_codebook"] else ())))
    return model.eval()


def depth_config(values: Mapping[str, Any]) -> DepthConfig:
    """From the section `rqtransformer` of a config."""
    width = values.get("embed_dim_out", values["embed_dim"])
    return DepthConfig(depth=values["block_size"][-1], values=values["vocab_size"], width=width,
                       code_width=values["input_embed_dim_1"], hidden_width=values["input_embed_dim_2"],
                       inner=values["embed_dim"], heads=values["head"]["block"]["n_head"],
                       layers=values["head"]["n_layer"])


def depth_rules(config: DepthConfig) -> list[Rule]:
    moved = {"in_hidden.": "in_mlp_2.", "in_code.": "in_mlp_1.", "blocks.": "head_transformer.blocks.",
             "widen.": "attn_in_proj.", "narrow.": "attn_out_proj.", "attention.q_proj": "attn.query",
             "attention.k_proj": "attn.key", "attention.v_proj": "attn.value", "attention.out_proj": "attn.proj",
             ".norm1.": ".ln1.", ".norm2.": ".ln2.", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2",
             "positions": "pos_emb_d"}
    ends = {"norm.weight": "classifier_mlp.layer_norm.weight", "norm.bias": "classifier_mlp.layer_norm.bias",
            "head.weight": "classifier_mlp.linear.weight", "head.bias": "classifier_mlp.linear.bias"}

    def rename(ours: str) -> str:
        if ours in ends:
            return ends[ours]
        for mine, theirs in moved.items():
            ours = ours.replace(mine, theirs)
        return ours
    return named(tensor_names(lambda: DepthTransformer(config)), rename)


def make_depth(values: Mapping[str, Any], tensors: Mapping[str, Tensor], source: object) -> DepthTransformer:
    """From the section and the tensors of `rqtransformer` (names without that prefix)."""
    config = depth_config(values)
    model = DepthTransformer(config)
    place(model, {**tensors, "pos_emb_d": tensors["pos_emb_d"][0]}, depth_rules(config), source)
    return model.eval()


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it, in float32."""
    return {k.removeprefix(prefix): v.float() for k, v in tensors.items() if k.startswith(prefix)}


# -- golden cases -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def tokenizer_cases(model: VQTokenizer, golden: Mapping[str, Tensor]) -> list[Case]:
    """`tokenizer`: whichever of its outputs the folder has; maps are (b, h, w, c) there."""
    features = model.features(golden["tokenizer.input.pixels"])
    out = model.quantizer(features)
    vectors = model.code_vectors(out.codes)
    own = {"features": features.movedim(1, -1), "codes": out.codes, "zq": out.vectors.movedim(1, -1),
           "partial_sums": torch.stack(out.partials).movedim(2, -1), "commitment_loss": out.losses["commitment"],
           "reconstruction": model.decode(out.codes), "code_embeddings": vectors,
           "code_embeddings_row0": vectors[:1]}
    return compare("tokenizer", {k: v for k, v in own.items() if f"tokenizer.output.{k}" in golden}, golden)


@torch.no_grad()
def depth_cases(tokenizer: VQTokenizer, head: DepthTransformer, golden: Mapping[str, Tensor]) -> list[Case]:
    vectors = tokenizer.code_vectors(golden["depth_head.input.codes"])
    return compare("depth_head", {"logits": head(golden["depth_head.input.hidden"], vectors)}, golden)


def stated(folder: Path, pattern: str, default: float) -> float:
    """A literal of the public code, so a folder can only say in its text that it differs."""
    text = (folder / "README.md").read_text() if (folder / "README.md").is_file() else ""
    found = re.search(pattern, text)
    return float(found[1]) if found else default


def literals(folder: Path) -> tuple[TokenSampling, float]:
    """Filters and guidance scale."""
    sampling = TokenSampling(top_k=int(stated(folder, r"top_k literal \d+ -> (\d+)", TOP_K)),
                             top_p=stated(folder, r"top_p (0?\.\d+)", TOP_P))
    return sampling, stated(folder, r"u \+ (\d+(?:\.\d+)?) \(c - u\)", SCALE)


def _generation(tokenizer: VQTokenizer, head: DepthTransformer, folder: Path,
                golden: Mapping[str, Tensor]) -> list[Case]:
    (sampling, scale), guided = literals(folder), []

    def draw(d: int, logits: Tensor) -> Tensor:
        c, u = logits.chunk(2)
        guided.append(u + scale * (c - u))
        codes = choose(log_probs(guided[-1], sampling), golden["depth_generate.input.uniforms"][:, d])
        return codes.repeat(2)

    def embed(d: int, codes: Tensor) -> Tensor:
        return residual(tokenizer).codebook_of(d).vectors(codes)

    codes, sums = head.generate(golden["depth_generate.input.hidden"][:, 0], embed, draw)
    half = len(codes) // 2
    return compare("depth_generate", {"codes": codes[:half], "features": sums[:half],
                                      "guided_logits": torch.stack(guided, 1)}, golden)


@torch.no_grad()
def _averages(tokenizer: VQTokenizer, golden: Mapping[str, Tensor]) -> list[Case]:
    """One training step of the codebooks, on the features of the case before; it changes the model: to be run last."""
    quantizer = residual(tokenizer)
    for book in quantizer.codebooks:
        book.config = replace(book.config, restart=False)  # a draw of theirs is nothing to compare with
    quantizer.follow(golden["tokenizer.output.features"].movedim(-1, 1), torch.Generator())
    cases = []
    for k, book in enumerate(quantizer.codebooks):
        stored = f"ema.output.codebook{k}."
        rows = golden[stored + "weight"]
        own = {"weight": book.weight, "cluster_size_ema": book.count, "embed_ema": book.total}
        cases += [Case.compare(stored + name, value, rows[:-1] if name == "weight" else golden[stored + name],
                               TOLERANCE) for name, value in own.items()]
    return cases


def parity(folder: Path) -> list[Case]:
    """Every case of a VILA-U folder: tokenizer, depth head, its generation, and the moving averages."""
    values, golden = json.loads((folder / "config.json").read_text()), load_file(folder / "golden.safetensors")
    theirs = load_file(folder / "weights.safetensors")
    tokenizer = make_tokenizer(values, below(theirs, "rqvaesiglip."), folder)
    head = make_depth(values["rqtransformer"], below(theirs, "rqtransformer."), folder)
    return [*tokenizer_cases(tokenizer, golden), *depth_cases(tokenizer, head, golden),
            *_generation(tokenizer, head, folder, golden), *_averages(tokenizer, golden)]
