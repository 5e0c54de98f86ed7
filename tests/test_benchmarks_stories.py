"""Stories: judged by their laws and by the picture before, whatever picture they start from."""
import numpy as np
import pytest

from diptych.benchmarks.stories import judge, parse_event
from diptych.document import Document
from diptych.world import tasks
from diptych.world.render import render
from diptych.world.scene import Scene
from diptych.world.stories import LAWS


def redrawn(document: Document, **changes: np.ndarray | str) -> Document:
    """With other pictures or sentences: piece number -> new content, as `p2="the star grows"`."""
    pieces = list(document.pieces)
    for name, value in changes.items():
        i = int(name[1:])
        pieces[i] = pieces[i].replace(**{"text" if isinstance(value, str) else "pixels": value})
    return Document(tuple(pieces), document.task, document.meta)


@pytest.fixture(scope="module")
def told() -> dict[str, Document]:
    """One story per law."""
    found: dict[str, Document] = {}
    for i in range(200):
        document = tasks.document("story", i, split="test")
        found.setdefault(document.meta["family"], document)
        if len(found) == len(LAWS):
            return found
    raise AssertionError(f"expected stories of {LAWS}, got {set(found)}")


def test_stories_of_every_law_are_followed(told):
    for law, document in told.items():
        assert all(judge(document, document).pictures), law
        assert all(judge(document, document).sentences), law
        frozen = redrawn(document, **{f"p{i}": document.pieces[1].pixels for i in (3, 5, 7)})
        # three backgrounds: the fourth picture has that of the first again
        assert judge(document, frozen).pictures[1:3] == (False, False), law


def test_a_story_may_start_elsewhere(told):
    """Only what the premise says is binding; what follows is judged by the picture that was drawn."""
    document = told["background"]
    scenes = [Scene.from_dict(s) for s in document.meta["scenes"]]
    smaller = [s.replace(objects=tuple(o.replace(radius=o.radius - 16) for o in s.objects)) for s in scenes]
    made = redrawn(document, **{f"p{2 * i + 1}": render(s, 64) for i, s in enumerate(smaller)})
    assert all(judge(document, made).pictures)
    mixed = redrawn(document, p5=render(smaller[2].replace(objects=smaller[2].objects[1:]), 64))
    assert judge(document, mixed).pictures[2] is False


def test_sentences_of_a_story(told):
    document = told["recolor"]
    made = redrawn(document, p2=document.pieces[4].text)
    assert judge(document, made).sentences[0] is False and all(judge(document, made).pictures)
    later = redrawn(told["vanish"], p2=told["vanish"].pieces[4].text)
    assert judge(told["vanish"], later).sentences[0] is False, "another object disappears"
    assert parse_event("recolor", "the red circle turns blue") == ("red circle", "blue")
    assert parse_event("transform", "the red circle turns into a star") == ("red circle", "a star")
    assert parse_event("appear", "a large red star at the top appears") == ("", "a large red star at the top")
    assert parse_event("vanish", "now the star is not there") == ("star", "")
    assert parse_event("grow", "the star turns blue") is None
    assert judge(told["appear"], redrawn(told["appear"], p2="something appears")).pictures[1] is False
