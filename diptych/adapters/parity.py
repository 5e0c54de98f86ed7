"""`diptych parity SYSTEM FOLDER`: our outputs against those of the published code, case by case."""
import difflib
import importlib
from pathlib import Path

from diptych.adapters.cases import Case

FAMILIES = {  # each module has parity(folder) -> cases
    "aia": "diptych.adapters.aia_cases",
    "bagel": "diptych.adapters.bagel",
    "blip3-o": "diptych.adapters.blip3_o_cases",
    "dpo-visual": "diptych.adapters.dpo_visual_cases",
    "emu3": "diptych.adapters.emu3_cases",
    "flow-grpo": "diptych.adapters.flow_grpo_cases",
    "fudoki": "diptych.adapters.fudoki",
    "harmon": "diptych.adapters.harmon_cases",
    "infinity": "diptych.adapters.infinity",
    "janus": "diptych.adapters.janus_cases",
    "llamagen-vq16": "diptych.adapters.tokenizers",
    "mammothmoda2": "diptych.adapters.mammothmoda2_cases",
    "metaquery": "diptych.adapters.metaquery_cases",
    "mmada": "diptych.adapters.mmada_cases",
    "rlinf-vla": "diptych.adapters.rlinf_vla_cases",
    "seed": "diptych.adapters.seed",
    "show-o": "diptych.adapters.show_o_cases",
    "srum": "diptych.adapters.srum_cases",
    "tokenflow": "diptych.adapters.tokenflow_cases",
    "unified-reward-think": "diptych.adapters.unified_reward_think_cases",
    "unifork": "diptych.adapters.unifork",
    "unified-reward": "diptych.adapters.unified_reward_text_cases",
    "unigame": "diptych.adapters.unigame_cases",
    "unipic2": "diptych.adapters.unipic2_cases",
    "var": "diptych.adapters.var",
    "vargpt": "diptych.adapters.vargpt_cases",
    "vila-u": "diptych.adapters.vila_u",
}


def run(system: str, folder: str | Path) -> list[Case]:
    folder = Path(folder)
    if system not in FAMILIES:
        near = difflib.get_close_matches(system, FAMILIES, 1, 0.0)
        raise ValueError(f"expected a system with an adapter ({', '.join(FAMILIES)}), got {system!r}; "
                         f"fix: did you mean {near[0]!r}?")
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a golden folder, got no folder {folder}")
    return importlib.import_module(FAMILIES[system]).parity(folder)


def table(cases: list[Case]) -> str:
    width = max(len(c.name) for c in cases)
    lines = [f"{'case':<{width}}  {'absolute':>10}  {'relative':>10}  {'tolerance':>10}"]
    lines += [f"{c.name:<{width}}  {c.absolute:>10.2e}  {c.relative:>10.2e}  {c.tolerance:>10.0e}  "
              f"{'ok' if c.passed else 'FAIL'}" for c in cases]
    worst = max(cases, key=lambda c: c.absolute / max(c.tolerance, 1e-12))
    return "\n".join([*lines, f"largest error against its tolerance: {worst.name} "
                              f"({worst.absolute:.2e} of {worst.tolerance:.0e})"])
