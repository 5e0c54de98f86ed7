"""UniFork's published files: the VILA-U tower and depth head that its language model's file holds."""
import json
from pathlib import Path

from safetensors.torch import load_file

from diptych.adapters.cases import Case
from diptych.adapters.vila_u import below, depth_cases, make_depth, make_tokenizer, tokenizer_cases

TOWER = "model.vision_tower.vision_tower."


def parity(folder: Path) -> list[Case]:
    """The cases of a UniFork folder that are built here: tokenizer and depth head."""
    values, golden = json.loads((folder / "config.json").read_text()), load_file(folder / "golden.safetensors")
    theirs = load_file(folder / "weights.safetensors")
    tokenizer = make_tokenizer(values, below(theirs, TOWER + "rqvaesiglip."), folder)
    head = make_depth(values["rqtransformer"], below(theirs, TOWER + "rqtransformer."), folder)
    return [*tokenizer_cases(tokenizer, golden), *depth_cases(tokenizer, head, golden)]
