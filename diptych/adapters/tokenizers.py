"""Published picture tokenizers of the VQGAN family: what their adapters share, and LlamaGen's VQ-16 (also inside Janus,
UniGame, TokenFlow).

Most keep the layout of latent diffusion, which is ours. LlamaGen's `conv_blocks` go from pixels to codes in the encoder
and from codes to pixels in the decoder; ours are numbered by resolution on both sides.
"""
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from diptych.adapters.cases import Case
from diptych.adapters.keys import Rule, to_ours
from diptych.parts.quantize import CodebookConfig, LossWeights, ResidualQuantizer, VectorConfig
from diptych.parts.semantic import DualTokenizer
from diptych.parts.vq import VQTokenizer, VQTokenizerConfig
from diptych.parts.vqgan import PyramidConfig

TOLERANCE = 1e-4
MIDDLE = {"mid.block_1": "mid.0", "mid.attn_1": "mid.1", "mid.block_2": "mid.2"}


def pyramid(tensors: Mapping[str, Tensor], prefix: str, channels: int) -> PyramidConfig:
    """The sizes of one side of a codec in the layout of latent diffusion, read off its tensors; `channels` is the unit
    of `channel_mult`."""
    found = [re.match(re.escape(prefix) + r"(?:down|up)\.(\d+)\.(block|attn)\.(\d+)\.", name) for name in tensors]
    places = {(int(m[1]), m[2], int(m[3])): m[0] for m in found if m}
    if not places:
        raise ValueError(f"expected tensors below {prefix}down or {prefix}up, got {', '.join(list(tensors)[:3])}")
    levels = range(1 + max(level for level, _, _ in places))
    first = {level: places[level, "block", 0] + "conv1" for level in levels}
    widths = [next(len(v) for name, v in tensors.items() if name.startswith(first[level]) and v.ndim == 4)
              for level in levels]
    return PyramidConfig(channels=channels, channel_mult=tuple(width // channels for width in widths),
                         blocks=tuple(sum(at[:2] == (level, "block") for at in places) for level in levels),
                         attention=tuple(level for level in levels if (level, "attn", 0) in places),
                         mid_attention=any(name.startswith(f"{prefix}mid.attn_1.") for name in tensors))


def named(names: Iterable[str], rename: Callable[[str], str | Rule]) -> list[Rule]:
    """One rule per tensor of ours from what it is called there."""
    renamed = [(name, rename(name)) for name in names]
    return [theirs if isinstance(theirs, Rule) else Rule((theirs,), ours) for ours, theirs in renamed]


def tensor_names(make: Callable[[], nn.Module]) -> list[str]:
    """The names in a module's state dict, without building its weights."""
    with torch.device("meta"):
        return list(make().state_dict())


def llamagen_config(values: Mapping[str, Any]) -> VQTokenizerConfig:
    """From the published names (`codebook_size`, `encoder_ch_mult`, ...) and the sizes that the class name implies."""
    def side(which: str, more: int) -> PyramidConfig:
        mult = tuple(values.get(f"{which}_ch_mult", values.get("ch_mult", (1, 1, 2, 2, 4))))
        blocks = values.get(f"{which}_num_res_blocks", values.get("num_res_blocks", 2)) + more
        return PyramidConfig(channels=values.get("ch", 128), channel_mult=mult, blocks=(blocks,) * len(mult),
                             attention=(len(mult) - 1,), norm_groups=values.get("group_norm_groups", 32))

    book = CodebookConfig(values=values.get("codebook_size", 16384), width=values.get("codebook_embed_dim", 8),
                          norm="always" if values.get("codebook_l2_norm", True) else "none")
    weights = LossWeights(commitment=values.get("commit_loss_beta", 0.25),
                          entropy=values.get("entropy_loss_ratio", 0.0))
    return VQTokenizerConfig(encoder=side("encoder", 0), decoder=side("decoder", 1),
                             latent_channels=values.get("z_channels", 256),
                             quantizer=VectorConfig(codebook=book, weights=weights))


def conv_block_name(ours: str, levels: int) -> str:
    """Our name of a tensor of the pyramid (`encoder.down.0.block.1...`) in the `conv_blocks` layout."""
    for mine, theirs in MIDDLE.items():
        ours = ours.replace(mine, theirs)
    side, rest = ours.split(".", 1)
    if rest.startswith(("down.", "up.")):
        kind, level, module, tail = rest.split(".", 3)
        index = int(level) if kind == "down" else levels - 1 - int(level)
        rest = f"conv_blocks.{index}.{module.replace('block', 'res')}.{tail}"
    return f"{side}.{rest}"


def llamagen_rules(config: VQTokenizerConfig, prefix: str = "") -> list[Rule]:
    """How every tensor of a VQ-16 is called here; `prefix` is theirs (Janus: `gen_vision_model.`)."""
    levels = len(config.decoder.blocks)

    def rename(ours: str) -> str:
        if ours.startswith(("encoder.", "decoder.")):
            return prefix + conv_block_name(ours, levels)
        return prefix + ours.replace("quantizer.codebook.", "quantize.embedding.")
    return named(tensor_names(lambda: VQTokenizer(config)), rename)


def residual(model: VQTokenizer | DualTokenizer) -> ResidualQuantizer:
    """The quantizer of a model that goes in steps."""
    assert isinstance(model.quantizer, ResidualQuantizer)
    return model.quantizer


def place(module: nn.Module, theirs: Mapping[str, Tensor], rules: Sequence[Rule], source: object,
          ignore: Sequence[str] = ()) -> None:
    """Load published tensors by rules; any that finds no home is an error."""
    state, report = to_ours(theirs, rules, {k: v.shape for k, v in module.state_dict().items()}, ignore)
    if report:
        raise ValueError(f"expected the published layout in {source}, got {report}")
    module.load_state_dict({k: v.float() for k, v in state.items()})


def load_llamagen(folder: str | Path) -> VQTokenizer:
    """A folder with `config.json` and `weights.safetensors`."""
    folder = Path(folder)
    config = llamagen_config(json.loads((folder / "config.json").read_text()))
    model = VQTokenizer(config)
    place(model, load_file(folder / "weights.safetensors"), llamagen_rules(config), folder,
          ("quantize.codebook_used",))
    return model.eval()


# -- golden cases -----------------------------------------------------------------------------------------------------


def compare(case: str, own: Mapping[str, Tensor], golden: Mapping[str, Tensor]) -> list[Case]:
    """Outputs of one case by their golden names; integers must be equal."""
    return [Case.compare(f"{case}.{k}", v, golden[f"{case}.output.{k}"], TOLERANCE if v.is_floating_point() else 0.0)
            for k, v in own.items()]


def gradients(name: str, module: nn.Module, golden: Mapping[str, Tensor], rules: Sequence[Rule]) -> list[Case]:
    """Gradients in `module` against those stored as `{name}{their key}`, each relative to its largest entry
    (those below 1e-6 throughout are rounding)."""
    home = {theirs: rule.ours for rule in rules for theirs in rule.theirs}
    cases = []
    for key in sorted(k for k in golden if k.startswith(name)):
        grad = module.get_parameter(home[key.removeprefix(name)]).grad
        if grad is None:
            raise ValueError(f"expected a gradient for {key}, got none")
        scale = golden[key].abs().max().clamp(min=1e-6)
        cases.append(Case.compare(key, grad / scale, golden[key] / scale, TOLERANCE))
    return cases


def parity(folder: Path) -> list[Case]:
    """Every case of a LlamaGen folder: codes, maps, reconstructions, training losses and gradients."""
    golden = load_file(folder / "golden.safetensors")
    model = load_llamagen(folder)
    pixels = golden["eval.input.pixels"]
    with torch.no_grad():
        features = model.features(pixels)
        quantized = model.quantizer(features)
        own = {"pre_quant": features, "indices": quantized.codes, "quant": model.quantizer.lookup(quantized.codes),
               "reconstruction": model.decode(quantized.codes)}
        cases = compare("eval", own, golden)
        codes, expected = golden["decode_code.input.codes"], golden["decode_code.output.pixels"]
        grid = [side // model.config.downsample for side in expected.shape[2:]]
        cases.append(Case.compare("decode_code.pixels", model.decode(codes.unflatten(1, grid)), expected, TOLERANCE))
    rebuilt, quantized = model(pixels)
    zero = torch.zeros(())
    terms = {theirs: quantized.losses.get(ours, zero) for theirs, ours in
             (("vq_loss", "codebook"), ("commit_loss", "commitment"), ("entropy_loss", "entropy"))}
    total = F.mse_loss(rebuilt, pixels) + torch.stack(list(terms.values())).sum()
    total.backward()
    cases += compare("train", {**terms, "total": total}, golden)
    return cases + gradients("train.output.grad.", model, golden, llamagen_rules(model.config))
