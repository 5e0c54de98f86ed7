"""Several questions about one picture, with their answers, for showing: the measured ones have a picture each."""
from typing import NamedTuple

from diptych.world.language import NUMBERS, article, plural
from diptych.world.sample import Stream, pairs
from diptych.world.scene import Scene, WorldConfig, place


class Asked(NamedTuple):
    question: str
    answer: str


def questions_about(scene: Scene, world: WorldConfig, rng: Stream) -> list[Asked]:
    """A number, something that is there, something that is not, a color and a place, as far as the picture has them."""
    some = rng.choice(scene.objects)
    count = sum(o.shape == some.shape for o in scene.objects)
    there = {(o.color, o.shape) for o in scene.objects}
    found = [Asked(f"how many {plural(some.shape)} are there ?", NUMBERS[count])]
    color, shape = rng.choice([p for p in pairs(world, None, None, False) if p not in there])
    for name, answer in ((f"{some.color} {some.shape}", "yes"), (f"{color} {shape}", "no")):
        found.append(Asked(f"is there {article(name)} {name} ?", answer))
    shapes = [o.shape for o in scene.objects]
    alone = [o for o in scene.objects if shapes.count(o.shape) == 1]
    if alone:
        one = rng.choice(alone)
        found.append(Asked(f"what color is the {one.shape} ?", one.color))
        found.append(Asked(f"in which part of the picture is the {one.shape} ?", place(one, scene.canvas) or ""))
    return found
