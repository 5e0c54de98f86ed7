"""VAR's published files: `vae.safetensors` (the multi-scale tokenizer; its attention has one matrix for q, k and v) and
`var.safetensors` (the transformer, which draws by class)."""
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diptych.adapters import scales as shared
from diptych.adapters.cases import Case
from diptych.adapters.keys import Rule
from diptych.adapters.tokenizers import TOLERANCE, compare, named, place, pyramid, residual, tensor_names
from diptych.objectives import next_scale
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TokenSampling
from diptych.parts.quantize import CodebookConfig, LossWeights, MixConfig, ResidualConfig, scale_inputs
from diptych.parts.scales import ScaleConfig, ScaleTransformer, block_causal
from diptych.parts.vq import VQTokenizer, VQTokenizerConfig


def tokenizer_config(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> VQTokenizerConfig:
    """From the `vae` section of the config and the tensors."""
    ratio, scales = abs(values["quant_resi"]), tuple((side, side) for side in values["v_patch_nums"])
    count = values["share_quant_resi"] or len(scales)  # 0: one convolution per scale
    quantizer = ResidualConfig(
        codebook=CodebookConfig(values=values["vocab_size"], width=values["z_channels"],
                                norm="lookup" if values["using_znorm"] else "none"),
        scales=scales, mix=MixConfig(count=count, ratio=ratio) if ratio > 1e-6 else None,
        weights=LossWeights(commitment=values["beta"]))
    return VQTokenizerConfig(encoder=pyramid(tensors, "encoder.", values["ch"]),
                             decoder=pyramid(tensors, "decoder.", values["ch"]), latent_channels=values["z_channels"],
                             in_kernel=values["quant_conv_ks"], out_kernel=values["quant_conv_ks"],
                             quantizer=quantizer)


def tokenizer_rules(config: VQTokenizerConfig, share: int) -> list[Rule]:
    """`share`: the published `share_quant_resi`, on which the names of the mixing convolutions depend."""
    convs = {0: r"quantize.quant_resi.\1.", 1: "quantize.quant_resi.qresi."}.get(
        share, r"quantize.quant_resi.qresi_ls.\1.")

    def rename(ours: str) -> str | Rule:
        if found := re.fullmatch(r"(.*attn.*)\.([qkv])\.(weight|bias)", ours):
            return Rule((f"{found[1]}.qkv.{found[3]}",), ours, part=("qkv".index(found[2]), 3))
        name = ours.replace("quantizer.codebooks.0.", "quantize.embedding.")
        return re.sub(r"^quantizer\.mix\.convs\.(\d+)\.", convs, name)
    return named(tensor_names(lambda: VQTokenizer(config)), rename)


def load_tokenizer(folder: str | Path) -> VQTokenizer:
    """The tokenizer of a folder with `config.json` (section `vae`) and `vae.safetensors`."""
    folder = Path(folder)
    values, theirs = json.loads((folder / "config.json").read_text())["vae"], load_file(folder / "vae.safetensors")
    config = tokenizer_config(values, theirs)
    model = VQTokenizer(config)
    place(model, theirs, tokenizer_rules(config, values["share_quant_resi"]), folder, ("quantize.ema_vocab_hit_SV",))
    return model.eval()


# -- the transformer --------------------------------------------------------------------------------------------------

LOGITS, DROP = 3e-4, 0.1


class ClassScales(nn.Module):
    """Pictures of a class: its embedding is both start and condition, and the row after the last class is none."""

    def __init__(self, config: ScaleConfig, classes: int) -> None:
        super().__init__()
        self.classes = nn.Embedding(classes + 1, config.width)
        self.decoder = ScaleTransformer(config)

    def forward(self, labels: Tensor, inputs: Tensor) -> Tensor:
        """Logits (b, L, values) of labels (b,) and what all scales but the first read (b, L - 1, c)."""
        condition = self.classes(labels)
        return self.decoder(self.decoder.enter(inputs, condition), condition, self.decoder.config.scales)


def decoder_config(values: Mapping[str, Any], codec: VQTokenizerConfig) -> ScaleConfig:
    """From the `var` section of the config."""
    width, book = values["embed_dim"], codec.quantizer.codebook
    assert isinstance(book, CodebookConfig)
    return ScaleConfig(width=width, layers=values["depth"], heads=values["num_heads"],
                       hidden=round(width * values["mlp_ratio"]), code_width=book.width, values=book.values,
                       code_shape=(), scales=tuple((side, side) for side in values["patch_nums"]), positions="table",
                       shared=values["shared_aln"], memory=False, unit=values["attn_l2_norm"], temperature=4.0,
                       norm_eps=values["norm_eps"])


def load(folder: str | Path, codec: VQTokenizerConfig) -> ClassScales:
    """The transformer of a folder with `config.json` (section `var`) and `var.safetensors`, for a tokenizer."""
    folder = Path(folder)
    values, theirs = json.loads((folder / "config.json").read_text())["var"], load_file(folder / "var.safetensors")
    model = ClassScales(decoder_config(values, codec), values["num_classes"])
    c = model.decoder.config
    rules = shared.decoder_rules(c, [f"blocks.{i}." for i in range(c.layers)], "attn")
    place(model, theirs, [*rules, Rule(("class_emb.weight",), "classes.weight")], folder,
          ("lvl_1L", "attn_bias_for_masking", *shared.constants(theirs)))
    return model.eval()


# -- golden cases -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def tokenizer_cases(folder: Path, golden: Mapping[str, Tensor]) -> list[Case]:
    model = load_tokenizer(folder)
    quantizer = residual(model)
    scales = quantizer.config.scales
    features = model.features(golden["vae.input.pixels"])
    out = quantizer(features)
    maps = quantizer.partial_maps(out.codes)
    codes = model.layout(*golden["vae.input.pixels"].shape[2:]).split(out.codes)
    own = {"f": features, "var_input": scale_inputs(maps, scales, "area"),
           "vq_loss": sum(out.losses.values(), torch.zeros(())),
           "images_per_scale": torch.stack([model.decode_vectors(x).clamp(-1, 1) for x in out.partials])}
    own |= {f"idx_scale{k}": part.flatten(1) for k, part in enumerate(codes)}
    own |= {f"fhat_scale{k}": x for k, x in enumerate(maps)}
    return compare("vae", own, golden)


def forward_case(model: ClassScales, golden: Mapping[str, Tensor]) -> list[Case]:
    """Teacher-forced on the codes of the tokenizer's case."""
    given, wanted = (shared.case_tensors("forward", golden, side) for side in ("input", "output"))
    scales = model.decoder.config.scales
    labels = given["labels"].masked_fill(given["drop_uniform"] < DROP, model.classes.num_embeddings - 1)
    codes = torch.cat([golden[f"vae.output.idx_scale{k}"] for k in range(len(scales))], 1)
    logits = model(labels, golden["vae.output.var_input"])
    errors = next_scale.loss(logits, codes)
    own = {"logits": logits, "ce_per_token": errors, "loss": errors.mean(),
           "attn_allowed": block_causal(scales)[None, None]}
    return shared.compare("forward", own, wanted, TOLERANCE, LOGITS)


def options(name: str, folder: Path) -> tuple[float, TokenSampling]:
    """Guidance w and cuts of a sampling case, which only the README beside it states; without one, by its name."""
    readme = folder / "README.md"
    stated = re.search(rf"\b{name}: cfg ([\d.]*\d)(?:, top_k (\d+))?(?:, top_p ([\d.]*\d))?",
                       readme.read_text() if readme.is_file() else "")
    if stated:
        return float(stated[1]), TokenSampling(top_k=int(stated[2] or 0), top_p=float(stated[3] or 1))
    digits = re.search(r"cfg(\d)(\d*)", name)
    if digits is None:
        raise ValueError(f"expected a sampling case named cfg and its scale, got {name!r}; fix: state `{name}: cfg W, "
                         "top_k K, top_p P` in README.md")
    cuts = TokenSampling() if name.endswith("_plain") else TokenSampling(top_k=20, top_p=0.95)
    return float(f"{digits[1]}.{digits[2] or 0}"), cuts


def sampling_case(model: ClassScales, codec: VQTokenizer, name: str, folder: Path,
                  golden: Mapping[str, Tensor]) -> list[Case]:
    """Picture by picture, each with its unconditional context; guidance grows from none to 1 + w."""
    given, wanted = (shared.case_tensors(name, golden, side) for side in ("input", "output"))
    w, cuts = options(name, folder)
    scales, quantizer = model.decoder.config.scales, residual(codec)
    chain = Guidance(branches=(Branch(context="null", scale=1 + w),), schedule="linear")
    how = next_scale.every_scale(len(scales), chain, cuts)
    drawn, told = list[Tensor](), list[list[Tensor]]()
    for i, label in enumerate(given["labels"].tolist()):
        condition = model.classes(torch.tensor([label, model.classes.num_embeddings - 1]))
        answer = shared.with_null(model.decoder, condition)
        uniforms = [given[f"uniforms_scale{k}"][i] for k in range(len(scales))]
        steps, logits = shared.run(next_scale.sample(quantizer, scales, "area", how, uniforms), answer)
        drawn.append(torch.cat([step.codes for step in steps]))
        told.append(logits)
    codes = torch.stack(drawn)
    f_hat = quantizer.lookup(codes)
    own = {f"logits_scale{k}": shared.by_context([t[k] for t in told]) for k in range(len(scales))}
    own |= {f"idx_scale{k}": codes[:, span] for k, span in enumerate(next_scale.spans(scales))}
    own |= {"f_hat": f_hat, "image": (codec.decode_vectors(f_hat).clamp(-1, 1) + 1) / 2}
    return shared.compare(name, own, wanted, TOLERANCE, LOGITS)


@torch.no_grad()
def parity(folder: Path) -> list[Case]:
    """Every case of a VAR folder: the tokenizer's, the teacher-forced pass, and drawing with given uniform numbers."""
    golden = load_file(folder / "golden.safetensors")
    codec = load_tokenizer(folder)
    model, cases = load(folder, codec.config), tokenizer_cases(folder, golden)
    for name in sorted({k.split(".")[0] for k in golden} - {"vae"}):
        cases += forward_case(model, golden) if name == "forward" else \
            sampling_case(model, codec, name, folder, golden)
    return cases
