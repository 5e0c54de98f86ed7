"""Janus folders that lack the picture tokenizer (`gen_vision_model`), as golden folders of methods on top of it do: the
codes of pictures are given there. What comes of it draws no pixels.

`config.json` as published, with `tiny_siglip` for the sizes of the vision tower.
"""
from collections.abc import Mapping
from pathlib import Path

from diptych.adapters.janus import IGNORE, config_of, rules
from diptych.adapters.keys import Rule, to_ours
from diptych.adapters.tensors import Tensors, need_weights, read_json
from diptych.systems.janus import Janus

CODEC = {"ch": 4, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 4, "group_norm_groups": 2}  # stands in


def load_language(folder: Path, ids: Mapping[str, int], *, side: int) -> tuple[Janus, list[Rule]]:
    """The system (eval mode) and the rules of its tensors. `ids`: bos, eos, image_start, image_end, pad; `side`: tokens
    on a side of a drawn picture."""
    values = read_json(folder / "config.json")
    drawn = values["gen_vision_config"]["params"]
    vq = {**CODEC, "codebook_size": drawn["image_token_size"], "codebook_embed_dim": drawn["n_embed"]}
    extra = {"vision_tower": values["tiny_siglip"], "vq": vq, "special_ids": dict(ids), "gen_image_size": 2 * side}
    config = config_of({**values, "_extra_sizes": extra})
    model = Janus(config).eval()
    own = [r for r in rules(config) if not r.ours.startswith("codec.")]
    shapes = {k: v.shape for k, v in model.state_dict().items() if not k.startswith("codec.")}
    state, report = to_ours(Tensors({"": need_weights(folder, ("weights",))}), own, shapes, IGNORE["original"])
    if report:
        raise ValueError(f"expected a Janus without its picture tokenizer in {folder}, got {report}")
    model.load_state_dict(state, strict=False)
    return model, own
