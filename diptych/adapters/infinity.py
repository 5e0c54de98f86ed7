"""Infinity's published files: `vae.safetensors` (multi-scale tokenizer with bits by sign, BSQ) and
`infinity.safetensors` (the transformer, drawing from the states of a text)."""
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diptych.adapters import scales as shared
from diptych.adapters.cases import Case
from diptych.adapters.keys import Rule, expand
from diptych.adapters.tokenizers import TOLERANCE, compare, named, place, pyramid, residual, tensor_names
from diptych.objectives import next_scale
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_scale import How
from diptych.objectives.next_token import TokenSampling
from diptych.parts.quantize import LossWeights, ResidualConfig, SignConfig, flip_bits, resize, scale_inputs
from diptych.parts.scales import ScaleConfig, ScaleTransformer, TextCondition
from diptych.parts.vq import VQTokenizer, VQTokenizerConfig

CONSTANT = ("quantize.lfq.mask", "quantizer.lfq.mask")  # powers of two


def tokenizer_config(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> VQTokenizerConfig:
    """From the whole config (sections `vae` and `schedule`) and the tensors."""
    vae = values["vae"]
    if any(frames != 1 for frames, _, _ in values["schedule"]):
        raise ValueError(f"expected scales of one frame, got {values['schedule']}; fix: video schedules are not built")
    quantizer = ResidualConfig(codebook=SignConfig(width=vae["codebook_dim"], unit=True, packed=False),
                               scales=tuple((h, w) for _, h, w in values["schedule"]), up="bilinear", compare="step",
                               weights=LossWeights(codebook=0.0, commitment=0.25))
    return VQTokenizerConfig(encoder=pyramid(tensors, "encoder.", vae["base_ch"]),
                             decoder=pyramid(tensors, "decoder.", vae["base_ch"]),
                             in_kernel=0, out_kernel=0, quantizer=quantizer)


def tokenizer_rules(config: VQTokenizerConfig) -> list[Rule]:
    """Every convolution and norm sits one module deeper there: `conv1.conv.weight`, `norm1.norm.weight`."""
    def rename(ours: str) -> str:
        return re.sub(r"(\w+)\.(weight|bias)$",
                      lambda m: f"{m[1]}.{'norm' if m[1].startswith('norm') else 'conv'}.{m[2]}", ours)
    return named(tensor_names(lambda: VQTokenizer(config)), rename)


def load_tokenizer(folder: str | Path) -> VQTokenizer:
    """The tokenizer of a folder with `config.json` and `vae.safetensors`."""
    folder = Path(folder)
    theirs = load_file(folder / "vae.safetensors")
    config = tokenizer_config(json.loads((folder / "config.json").read_text()), theirs)
    model = VQTokenizer(config)
    place(model, theirs, tokenizer_rules(config), folder, CONSTANT)
    return model.eval()


# -- the transformer --------------------------------------------------------------------------------------------------

# of squares of 1 M pixels: every schedule has the positions of this one
SIDES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
# settings of the transformer that would change it, with the one value that is built here
FIXED = {"rms_norm": False, "head_aln": True, "nm0": False, "cos_attn": True, "swiglu": False, "head_depth": 1,
         "tau": 1, "add_lvl_embeding_only_first_block": 1, "use_bit_label": 1, "rope2d_each_sa_layer": 1,
         "rope2d_normalized_by_hw": 2, "apply_spatial_patchify": 0, "cross_attn_layer_scale": -1.0}
LOGITS = 3e-4


class TextScales(nn.Module):
    """Pictures from the states of a text: pooled they are start and condition, projected the memory."""

    def __init__(self, config: ScaleConfig, text_width: int, heads: int, rows: int, eps: float) -> None:
        super().__init__()
        self.text = TextCondition(config.width, text_width, heads, rows, project=True, eps=eps)
        self.decoder = ScaleTransformer(config)

    def conditions(self, texts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """States (m_i, text_width) of several texts -> condition (b, w), memory (b, m, w), which of it counts."""
        states = nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
        lengths = torch.tensor([len(t) for t in texts])
        known = torch.arange(states.shape[1]) < lengths[:, None]
        return self.text.condition(states, known), self.text.memory(states), known


def decoder_config(values: Mapping[str, Any], codec: VQTokenizerConfig, levels: int) -> ScaleConfig:
    """From the config (sections `infinity` and `schedule`); the number of levels is that of the tensors."""
    about = values["infinity"]
    for key, only in FIXED.items():
        if about.get(key, only) != only:
            raise ValueError(f"expected {key} to be {only!r}, got {about[key]!r}")
    if values.get("h_div_w", 1.0) != 1.0:
        raise ValueError(f"expected square pictures (h_div_w 1.0), got {values['h_div_w']}; fix: other schedules are "
                         "not built")
    width, bits = about["embed_dim"], codec.quantizer.width
    return ScaleConfig(width=width, layers=about["depth"], heads=about["num_heads"],
                       hidden=round(width * about["mlp_ratio"] / 256) * 256, code_width=bits, code_shape=(bits,),
                       scales=tuple((h, w) for _, h, w in values["schedule"]), levels=levels,
                       rotary_scales=tuple((side, side) for side in SIDES), shared=about["shared_aln"],
                       norm_eps=about.get("norm_eps", 1e-6))


def block_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Of a transformer's tensors: blocks come in chunks, which run one after the other."""
    found = [re.match(r"block_chunks\.(\d+)\.module\.(\d+)\.", name) for name in tensors]
    places = sorted({(int(m[1]), int(m[2])) for m in found if m})
    return [f"block_chunks.{chunk}.module.{block}." for chunk, block in places]


def condition_rules(width: int, heads: int, *, prefix: str = "", ours: str = "text.",
                    project: bool = True) -> list[Rule]:
    """Of what a text is made into; `width` of the transformer."""
    pool = f"{prefix}text_proj_for_sos.ca."
    out = [Rule((f"{prefix}text_norm.weight",), f"{ours}norm.weight"), Rule((f"{prefix}cfg_uncond",), f"{ours}null"),
           Rule((f"{pool}mat_q",), f"{ours}pool.query", shape=(1, heads, width // heads)),
           Rule((f"{pool}mat_kv.weight",), f"{ours}pool.attention.kv.weight"),
           Rule((f"{pool}v_bias",), f"{ours}pool.attention.v_bias"),
           *expand(Rule((f"{pool}proj.{{w}}",), f"{ours}pool.attention.out.{{w}}"), w=shared.BOTH)]
    if project:
        out += expand(Rule((f"{prefix}text_proj_for_ca.{{n}}.{{w}}",), f"{ours}project.{{n}}.{{w}}"), n=(0, 2),
                      w=shared.BOTH)
    return out


def load(folder: str | Path, codec: VQTokenizerConfig) -> TextScales:
    """The transformer of a folder with `config.json` and `infinity.safetensors`, for a tokenizer."""
    folder = Path(folder)
    values, theirs = json.loads((folder / "config.json").read_text()), load_file(folder / "infinity.safetensors")
    c, about = decoder_config(values, codec, len(theirs["lvl_embed.weight"])), values["infinity"]
    heads = theirs["text_proj_for_sos.ca.mat_q"].shape[1]
    model = TextScales(c, about["text_channels"], heads, about["text_maxlen"], about["norm_eps"])
    rules = shared.decoder_rules(c, block_names(theirs), "sa") + condition_rules(c.width, heads)
    place(model, theirs, rules, folder, shared.constants(theirs))
    return model.eval()


# -- golden cases -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def tokenizer_cases(folder: Path, golden: Mapping[str, Tensor]) -> list[Case]:
    model = load_tokenizer(folder)
    quantizer = residual(model)
    scales = quantizer.config.scales
    features = model.features(golden["vae.input.pixels"])
    out = quantizer(features)
    bits = model.layout(*golden["vae.input.pixels"].shape[2:]).split(out.codes)
    own = {"h": features, "z": out.vectors, "reconstruction": model.decode(out.codes).clamp(-1, 1)}
    own |= {f"bits_scale{k}": part[:, None] for k, part in enumerate(bits)}
    own |= {f"area_input_scale{k}": resize(x, grid, "area").unsqueeze(2)
            for k, (x, grid) in enumerate(zip(out.partials, scales[1:], strict=False), 1)}
    cases = compare("vae", own, golden)
    options = json.loads((folder / "config.json").read_text())["self_correction"]
    if options["apply_spatial_patchify"]:
        raise ValueError("expected apply_spatial_patchify 0, got 1; fix: that layout of bits is not built")
    strengths = (golden["correct.input.strength_percent"] * 0.01).tolist()
    uniforms = [golden[f"correct.input.uniform_scale{k}"] for k in range(len(strengths))]
    # without requantization the flips only reach what the published code returns besides, not the map
    out = quantizer(features, change=flip_bits(uniforms, strengths) if options["noise_apply_requant"] else None)
    inputs = scale_inputs(out.partials, scales, "bilinear")
    return cases + compare("correct", {"labels": out.codes, "x_wo_prefix": inputs}, golden)


def forward_cases(model: TextScales, golden: Mapping[str, Tensor]) -> list[Case]:
    """Teacher-forced on what self-correction made; once more with the learned rows in place of the second text."""
    given, wanted = (shared.case_tensors("forward", golden, side) for side in ("input", "output"))
    labels, inputs = (golden[f"correct.output.{k}"] for k in ("labels", "x_wo_prefix"))
    texts, scales = list(given["text"].split(given["text_lens"].tolist())), model.decoder.config.scales
    cases = []
    for name in ("forward", "forward_drop"):
        if name == "forward_drop":
            texts[1] = model.text.null[:len(texts[1])]
        condition, memory, known = model.conditions(texts)
        logits = model.decoder(model.decoder.enter(inputs, condition), condition, scales, memory, known)
        errors = next_scale.loss(logits, labels.long())
        own = {"logits": logits.flatten(2), "pooled_text": condition, "loss": errors.mean(),
               "loss_per_token": errors.mean(-1)}
        if name == "forward_drop":
            own, wanted = {"logits": own["logits"][1:]}, shared.case_tensors(name, golden, "output")
        cases += shared.compare(name, own, wanted, TOLERANCE, LOGITS) if wanted else []
    return cases


def sampling_case(model: TextScales, codec: VQTokenizer, name: str, golden: Mapping[str, Tensor]) -> list[Case]:
    """Picture by picture; a scale whose guidance is 1 is compared in the context of the text alone."""
    given, wanted = (shared.case_tensors(name, golden, side) for side in ("input", "output"))
    scales, quantizer = model.decoder.config.scales, residual(codec)
    how = [How(Guidance(branches=(Branch(context="null", scale=cfg),)),
               TokenSampling(temperature=tau, top_k=900, top_p=0.97))
           for cfg, tau in zip(given["cfg_per_scale"].tolist(), given["tau_per_scale"].tolist(), strict=True)]
    drawn, told = list[Tensor](), list[list[Tensor]]()
    for i, text in enumerate(given["text"].split(given["text_lens"].tolist())):
        condition, memory, known = model.conditions([text, model.text.null[:len(text)]])
        answer = shared.with_null(model.decoder, condition, memory, known)
        uniforms = [given[f"uniforms_scale{k}"][i] for k in range(len(scales))]
        steps, logits = shared.run(next_scale.sample(quantizer, scales, "bilinear", how, uniforms), answer)
        drawn.append(torch.cat([step.codes for step in steps]))
        told.append(logits)
    codes = torch.stack(drawn)
    vectors = quantizer.lookup(codes)
    image = codec.decode_vectors(vectors).clamp(-1, 1)
    own = {"summed_codes": vectors, "image": image, "image_uint8_bgr": eight_bit(image)}
    for k, part in enumerate(codec.quantizer.layout(scales[-1]).split(codes)):
        own[f"bits_scale{k}"] = part[:, None]
        own[f"logits_scale{k}"] = shared.by_context([t[k] for t in told])[:len(wanted[f"logits_scale{k}"])].flatten(2)
    return shared.compare(name, own, wanted, TOLERANCE, LOGITS, {"image_uint8_bgr": 1.0})


def eight_bit(image: Tensor) -> Tensor:
    """(b, 3, h, w) in [-1, 1] -> (b, h, w, 3) of 0 to 255, truncated, blue first: as published pictures are stored."""
    return ((image + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1).flip(3)


@torch.no_grad()
def parity(folder: Path) -> list[Case]:
    """Every case of an Infinity folder: the tokenizer's, self-correction, the teacher-forced pass, and drawing."""
    golden = load_file(folder / "golden.safetensors")
    codec = load_tokenizer(folder)
    model, cases = load(folder, codec.config), tokenizer_cases(folder, golden)
    cases += forward_cases(model, golden)
    for name in sorted({k.split(".")[0] for k in golden} - {"vae", "correct", "forward", "forward_drop"}):
        cases += sampling_case(model, codec, name, golden)
    return cases
