"""The golden cases of UnifiedReward and the texts of UnifiedReward-Think: what the published readers make of canned
replies, which pairs are kept, rewards of a reply, and which frames are shown. All comparisons are exact."""
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diptych.adapters.cases import Case
from diptych.alignment.rewards import verdicts


def parity(folder: Path) -> list[Case]:
    """Every case of a UnifiedReward folder."""
    golden = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    _known(golden, ("pair_generation", "pair_understanding", "point_scores", "sift"))
    cases: list[Case] = []
    for n, row in enumerate(golden.get("pair_generation", ())):
        own = {"winner": verdicts.published_pair_generation(row["text"], "Image"),
               "video_winner": verdicts.published_pair_generation(row["video_text"], "Video")}
        cases += _exact(f"pair_generation.{n}", own, row)
    for n, row in enumerate(golden.get("pair_understanding", ())):
        own = {"image_winner": verdicts.published_pair_understanding(row["text"], "image"),
               "video_winner": verdicts.published_pair_understanding(row["text"], "video")}
        cases += _exact(f"pair_understanding.{n}", own, row)
    for n, row in enumerate(golden.get("point_scores", ())):
        served = verdicts.published_point_served(row["text"])
        own = {"sdxl_sift": verdicts.published_point_sift(row["text"]),
               "image_understanding": verdicts.published_point_understanding(row["text"]),
               "sglang": served, "sglang_reward": served / 5}
        cases += _exact(f"point_scores.{n}", own, row)
    for n, row in enumerate(golden.get("sift", ())):
        cases += _exact(f"sift.{n}", {kind: _sifted(row, kind) for kind in ("numeric", "strings")}, row)
    return cases


def _sifted(row: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """`strings`: as the script for pictures compares them, letter by letter."""
    sides = [[str(s) if kind == "strings" else s for s in row[f"{side}_scores"]] for side in ("chosen", "rejected")]
    found = verdicts.sift(*sides)
    return {"chosen": f"c{found.chosen}", "rejected": f"r{found.rejected}", "chosen_score": found.chosen_score,
            "rejected_score": found.rejected_score, "kept": found.kept}


def text_cases(folder: Path) -> list[Case]:
    """The texts of a UnifiedReward-Think folder: rewards, frames, and the constants of its training."""
    golden = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    _known(golden, ("rewards", "frame_selection", "constants"))
    cases: list[Case] = []
    for n, row in enumerate(golden.get("rewards", ())):
        reply = row["completion"]
        own = {"extracted": verdicts.answer(reply), "accuracy": float(verdicts.accurate(reply, row["solution"])),
               "format": float(verdicts.well_formed(reply))}
        cases += _exact(f"rewards.{n}", own, row)
    for row in golden.get("frame_selection", ()):
        own = {"kept": verdicts.thinned(row["n_frames"], verdicts.FRAMES)}
        cases += _exact(f"frame_selection.{row['n_frames']}", own, row)
    # the tensors of the folder are compared with these: every number that decides them must be stated
    wanted = {"beta", "num_generations", "eos_token_id", "advantage_eps", "clamp"}
    if "constants" in golden:
        cases.append(_case("constants", set(golden["constants"]) >= wanted))
    return cases


def _known(golden: Mapping[str, Any], names: Iterable[str]) -> None:
    foreign = sorted(set(golden) - {*names, "note"})
    if foreign:
        raise ValueError(f"expected golden cases out of {', '.join(names)}, got {foreign[0]!r}")


def _exact(name: str, own: Mapping[str, Any], row: Mapping[str, Any]) -> list[Case]:
    return [_case(f"{name}.{key}", value == row[key] and type(value) is type(row[key]))
            for key, value in own.items() if key in row]


def _case(name: str, equal: bool) -> Case:
    return Case(name, float(not equal), float(not equal), 0.0)
