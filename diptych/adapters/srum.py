"""Published files of SRUM (arXiv 2510.12784): judged pictures as JSON lines, before and after formatting.

    judged      image_file, prompt, vlm_rewards [{identified_object, bbox, score}], global_layout_reward
    formatted   bad_image_file = good_image_file, prompt (the original one), vlm_rewards with the whole first
"""
from collections.abc import Mapping, Sequence
from typing import Any

from diptych.alignment.reward_map import BoxPixels, Region, clip_box
from diptych.alignment.self_reward import Judged

WHOLE = "global_layout_reward"  # name of the entry about the whole


def box_of_mask(mask: Mapping[str, Any]) -> BoxPixels:
    """A proposal's xywh -> xyxy, cut to whole pixels."""
    x, y, width, height = mask["bbox"]
    return int(x), int(y), int(x + width), int(y + height)


def proposals(masks: Sequence[Mapping[str, Any]], most: int | None = None) -> list[dict[str, Any]]:
    """Boxes of masks, the largest area first."""
    found = [{"bbox": list(box_of_mask(m)), "area": m["area"]} for m in masks]
    return sorted(found, key=lambda b: -b["area"])[:most]


def formatted(record: Mapping[str, Any], prompts: Mapping[str, str]) -> dict[str, Any] | None:
    """What the trainer reads, or None for a picture without a prompt, without any reward, or whose whole scores exactly
    0 (so that judgements which could not be read vanish)."""
    name = record["image_file"]
    prompt = prompts.get(name)
    rewards: list[dict[str, Any]] = []
    whole = record.get(WHOLE)
    if whole is not None:
        if whole["global_layout_score"] == 0:
            return None
        rewards.append({"object": WHOLE, "bbox": whole.get("bbox", [0, 0, 0, 0]),
                        "score": whole["global_layout_score"], "reason": whole.get("reason", "")})
    rewards += [{"object": r["identified_object"], "bbox": r["bbox"], "score": r["score"]}
                for r in record.get("vlm_rewards", ()) if "identified_object" in r]
    if not prompt or not rewards:
        return None
    return {"bad_image_file": name, "good_image_file": name, "prompt": prompt, "vlm_rewards": rewards}


def regions(rewards: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> list[Region]:
    """The entries about regions of a picture (height, width) that have a box inside it and a score."""
    out = []
    for entry in rewards:
        box = clip_box(entry.get("bbox", ()), size)
        if entry.get("object") != WHOLE and box is not None and "score" in entry:
            out.append(Region(box=box, score=float(entry["score"]), name=str(entry.get("object", ""))))
    return out


def judged(record: Mapping[str, Any], size: tuple[int, int]) -> Judged:
    """A formatted record, of a picture (height, width), as ours."""
    whole = next((float(r["score"]) for r in record["vlm_rewards"] if r.get("object") == WHOLE), None)
    return Judged(prompt=record["prompt"], picture=record["good_image_file"], overall=whole,
                  regions=tuple(regions(record["vlm_rewards"], size)))
