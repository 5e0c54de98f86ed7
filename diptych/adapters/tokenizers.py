"""Published picture tokenizers of the VQGAN family: LlamaGen's VQ-16 (also inside Janus, UniGame, TokenFlow).

Their `conv_blocks` go from pixels to codes in the encoder and from codes to pixels in the decoder; ours are numbered by
resolution on both sides.
"""
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from diptych.adapters.cases import Case
from diptych.adapters.keys import Rule, to_ours
from diptych.parts.quantize import CodebookConfig, LossWeights, VectorConfig
from diptych.parts.vq import VQTokenizer, VQTokenizerConfig
from diptych.parts.vqgan import PyramidConfig

TOLERANCE = 1e-4
ENCODER_MIDDLE = {"mid.block_1": "mid.0", "mid.attn_1": "mid.1", "mid.block_2": "mid.2"}


def llamagen_config(values: Mapping[str, Any]) -> VQTokenizerConfig:
    """From the published names (`codebook_size`, `encoder_ch_mult`, ...) and the sizes that the class name implies."""
    def side(which: str, more: int) -> PyramidConfig:
        mult = tuple(values.get(f"{which}_ch_mult", values.get("ch_mult", (1, 1, 2, 2, 4))))
        blocks = values.get(f"{which}_num_res_blocks", values.get("num_res_blocks", 2)) + more
        return PyramidConfig(channels=values.get("ch", 128), channel_mult=mult, blocks=(blocks,) * len(mult),
                             attention=(len(mult) - 1,), norm_groups=values.get("group_norm_groups", 32))

    book = CodebookConfig(values=values.get("codebook_size", 16384), width=values.get("codebook_embed_dim", 8),
                          norm="always" if values.get("codebook_l2_norm", True) else "none")
    weights = LossWeights(commitment=values.get("commit_loss_beta", 0.25), entropy=values.get("entropy_loss_ratio", 0.0))
    return VQTokenizerConfig(encoder=side("encoder", 0), decoder=side("decoder", 1),
                             latent_channels=values.get("z_channels", 256),
                             quantizer=VectorConfig(codebook=book, weights=weights))


def conv_block_name(ours: str, levels: int) -> str:
    """Our name of a tensor of the pyramid (`encoder.down.0.block.1...`) in the `conv_blocks` layout."""
    for mine, theirs in ENCODER_MIDDLE.items():
        ours = ours.replace(mine, theirs)
    side, rest = ours.split(".", 1)
    if rest.startswith(("down.", "up.")):
        kind, level, module, tail = rest.split(".", 3)
        index = int(level) if kind == "down" else levels - 1 - int(level)
        rest = f"conv_blocks.{index}.{module.replace('block', 'res')}.{tail}"
    return f"{side}.{rest}"


def llamagen_rules(config: VQTokenizerConfig, prefix: str = "") -> list[Rule]:
    """How every tensor of a VQ-16 is called here; `prefix` is theirs (Janus: `gen_vision_model.`)."""
    with torch.device("meta"):
        names = VQTokenizer(config).state_dict()
    special = {"quantizer.codebook.weight": "quantize.embedding.weight"}
    levels = len(config.encoder.blocks)
    return [Rule((prefix + (special.get(n) or (conv_block_name(n, levels) if n.startswith(("encoder", "decoder")) else n)
                            ),), n) for n in names]


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


def gradients(name: str, module: nn.Module, golden: Mapping[str, Tensor], rules: Sequence[Rule]) -> list[Case]:
    """Gradients in `module` against those stored as `{name}{their key}`, each relative to its largest entry."""
    home = {theirs: rule.ours for rule in rules for theirs in rule.theirs}
    cases = []
    for key in sorted(k for k in golden if k.startswith(name)):
        grad = module.get_parameter(home[key.removeprefix(name)]).grad
        if grad is None:
            raise ValueError(f"expected a gradient for {key}, got none")
        scale = golden[key].abs().max().clamp(min=1e-12)
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
        cases = [Case.compare(f"eval.{k}", v, golden[f"eval.output.{k}"], 0 if k == "indices" else TOLERANCE)
                 for k, v in own.items()]
        codes, expected = golden["decode_code.input.codes"], golden["decode_code.output.pixels"]
        grid = [side // model.config.downsample for side in expected.shape[2:]]
        cases.append(Case.compare("decode_code.pixels", model.decode(codes.unflatten(1, grid)), expected, TOLERANCE))
    rebuilt, quantized = model(pixels)
    zero = torch.zeros(())
    terms = {theirs: quantized.losses.get(ours, zero) for theirs, ours in
             (("vq_loss", "codebook"), ("commit_loss", "commitment"), ("entropy_loss", "entropy"))}
    total = F.mse_loss(rebuilt, pixels) + torch.stack(list(terms.values())).sum()
    total.backward()
    cases += [Case.compare(f"train.{k}", v, golden[f"train.output.{k}"], TOLERANCE)
              for k, v in {**terms, "total": total}.items()]
    return cases + gradients("train.output.grad.", model, golden, llamagen_rules(model.config))
