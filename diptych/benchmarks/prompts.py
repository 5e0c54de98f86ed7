"""What every system is asked to draw, so that drawings stand side by side."""
import itertools

from diptych.document import Document
from diptych.world import tasks

SPREAD = {1: 3, 2: 3, 3: 2}  # objects -> so many prompts


def prompts(world: str = "mini") -> list[Document]:
    """Of the test split the first documents with one object, with two and with three, none of them chosen by how it
    looks; with their true pictures. A document's seed is its place in the list."""
    found: dict[int, list[Document]] = {count: [] for count in SPREAD}
    for index in itertools.count():
        document = tasks.document("draw", index, split="test", world=world)
        count = len(document.meta["scene"]["objects"])
        if len(found.get(count, ())) < SPREAD.get(count, 0):
            found[count].append(document)
        if all(len(found[count]) == most for count, most in SPREAD.items()):
            break
    return [document for group in found.values() for document in group]
