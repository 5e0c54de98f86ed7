"""How exactly the parser recovers scenes: exact among those it answers, abstentions, place and radius errors, speed.

    python perf/perceive.py --worlds mini core8 rich --scenes 1000

A scene is exact if the multiset of (colour, shape, size, texture), the background and every centre (within .02 of the
side) are right. Speed is CPU time on one core, templates warm; set OMP_NUM_THREADS=1.
"""
import argparse
import math
import sys
import time
from collections import Counter

import numpy as np

from diptych.world.degrade import DEGRADATIONS
from diptych.world.perceive import Percept, perceive
from diptych.world.render import render
from diptych.world.sample import sample_scene, stream
from diptych.world.scene import ROTATION_PERIOD, WORLDS, Object, Scene

NEAR = 0.02


def pairs(scene: Scene, percept: Percept) -> list[tuple[Object, Object]] | None:
    """(true, perceived) objects if the percept is exact, else None."""
    left, out = list(percept.objects), []
    for obj in scene.objects:
        same = [f for f in left if f.attributes() == obj.attributes() and math.dist(f.center, obj.center) < NEAR]
        if not same:
            return None
        left.remove(same[0])
        out.append((obj, same[0]))
    return out if not left and percept.background == scene.background else None


def measure(world: str, name: str, count: int) -> str:
    config, rng = WORLDS[world], np.random.default_rng(0)
    exact = answered = 0
    seconds = 0.0
    places: list[float] = []
    radii: list[float] = []
    turns: list[float] = []
    why: Counter[str] = Counter()
    for i in range(count):
        scene = sample_scene(config, stream(config, "perceive", "train", i))
        picture = DEGRADATIONS[name](render(scene, config.pixels), rng)
        start = time.process_time()
        percept = perceive(picture, config)
        seconds += time.process_time() - start
        if not percept.certain:
            why.update(percept.reasons)
            continue
        answered += 1
        found = pairs(scene, percept)
        exact += found is not None
        for a, b in found or []:
            places.append(math.dist((a.x, a.y), (b.x, b.y)) * config.pixels / 4096)
            radii.append(abs(b.radius / a.radius - 1))
            period = ROTATION_PERIOD[a.shape]
            if config.rotated and period > 1:
                turns.append(abs((a.rotation - b.rotation + period / 2) % period - period / 2))
    p95 = [float(np.percentile(v, 95)) if v else float("nan") for v in (places, radii, turns)]
    turned = f", turn {p95[2]:.1f} deg" if turns else ""
    return (f"{world:6} {name:17} exact {exact / max(answered, 1):.4f} of {answered}, abstained "
            f"{1 - answered / count:.4f}, p95 centre {p95[0]:.2f} px, radius {100 * p95[1]:.1f}%"
            f"{turned}, {count / seconds:.0f}/s {dict(why.most_common(3)) or ''}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", default=["mini", "core8"], choices=list(WORLDS))
    parser.add_argument("--degradations", nargs="+", default=list(DEGRADATIONS), choices=list(DEGRADATIONS))
    parser.add_argument("--scenes", type=int, default=300)
    args = parser.parse_args()
    for world in args.worlds:
        measure(world, "clean", 40)  # warms the templates
        for name in args.degradations:
            sys.stdout.write(measure(world, name, args.scenes) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
