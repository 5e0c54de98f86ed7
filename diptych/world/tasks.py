"""Documents of the world: every task is a pure function of (version, world, task, split, index).

    caption    [Image, Text, Text*]                 question   [Image, Text, Text*]
    draw       [Text, Image*]                       edit       [Image, Text, Image*]
    refer      [Image, Text, Boxes* (1, 4)]         layout     [Text, Boxes with labels, Image*]
    plan       [Text, Boxes* with labels, Image*]   story      [Text, Image*, then three times Text*, Image*]
    talk       [Image, then up to six times Text, Text* or Boxes*]

    check      [Image, Text, Text*], a question that the prompt of `draw` decides about the picture drawn after it

and, as `caption` and `draw`, at one level of detail (`LEVELLED`):

    caption-short  what there is and how many            draw-short, draw-long  the same, or everything, as the prompt

and, for language models, without pictures (`TEXT_TASKS`):

    tell       [Text*], a description               read       [Text, Text, Text*]: description, question, answer
    quiz       [Text, then up to six times Text, Text*]: description, questions with their answers

and, for judges, labelled by how many defects were put in (`JUDGING`, see `world.judging`):

    draw-pair, story-pair      [Image, ..., Text, Text*]: pictures of both candidates, what was asked for, the verdict
    answer-pair                [Image, Text, Text*]: a picture, a question and two answers, the verdict
    ...-point                  the same with one candidate, and its score
    ...-think                  as the pairs, with thoughts before the verdict
    inspect                    [Image, Text, Text*]: a drawing with defects, and its look, form or caption as asked for

(* target, said by the assistant.) `meta` holds what verifiers need, as JSON values:

    task, split, index, world   where the document comes from
    scene                       record of the first picture (`Scene.from_dict`); "after" of an edit, "scenes" of a story
    spec                        claims of the caption or the prompt; of an edit: of the picture afterwards
    family, program, answer     of a question; family and program of a reference; family (the law) and events of a story
    turns                       of a talk: kind, program, and answer or target of every turn
    better, scores, answer      of what is judged: 1 or 2 of a pair, scores by candidate and dimension, the verdict;
                                "said": the answers that are judged
    edit, target, changes       kind, object and new attributes of an edit; target of a reference
"""
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diptych.document import Boxes, Document, Image, Piece, Text
from diptych.world import judging, language
from diptych.world.claims import questions
from diptych.world.edits import sample_edit
from diptych.world.language import LEVELS, caption, caption_spec, describe, draw_prompt, label, reading_order, request
from diptych.world.questions import sample_question
from diptych.world.refer import REQUESTS, sample_reference
from diptych.world.render import box_of, render
from diptych.world.sample import SPLITS, Stream, find_world, sample_scene, stream
from diptych.world.scene import Object, Scene, WorldConfig
from diptych.world.spec import Spec
from diptych.world.stories import sample_story
from diptych.world.talks import Turn, sample_talk

# objects in the pictures a model has to draw; captions and questions use min_objects .. max_objects uniformly
DRAW_COUNTS = {1: 0.4, 2: 0.35, 3: 0.2, 4: 0.05}


def document(task: str, index: int, *, split: str = "train", world: WorldConfig | str = "mini",
             template: str = "train") -> Document:
    """Item `index` of a task. `template="held_out"` words the same scenes in ways that never occur in training."""
    if task not in _BUILD:
        raise ValueError(f"expected task to be one of {', '.join(_BUILD)}, got {task!r}")
    if split not in SPLITS:
        raise ValueError(f"expected split to be one of {', '.join(SPLITS)}, got {split!r}")
    if template not in language.TEMPLATES:
        raise ValueError(f"expected template to be one of {', '.join(language.TEMPLATES)}, got {template!r}")
    config = find_world(world)
    rng = stream(config, task, split, index)
    pieces, facts = _BUILD[task](config, rng, split, template)
    return Document(tuple(pieces), task, {"task": task, "split": split, "index": index, "world": config.name, **facts})


Built = tuple[list[Piece], dict[str, Any]]
Build = Callable[[WorldConfig, Stream, str, str], Built]
Words = Callable[[Scene, Stream, str], tuple[str, Spec]]  # what is said of a scene, and what that claims


def _image(scene: Scene, world: WorldConfig, target: bool = False) -> Image:
    return Image(pixels=render(scene, world.pixels), role="assistant" if target else "user", target=target)


def _said(text: str) -> Text:
    return Text(text=text, role="assistant", target=True)


def _full(scene: Scene, rng: Stream, template: str) -> tuple[str, Spec]:
    return caption(scene), caption_spec(scene)


def _brief(scene: Scene, rng: Stream, template: str) -> tuple[str, Spec]:
    return language.brief(scene, rng)


def _captioned(words: Words) -> Build:
    """Pictures described in these words."""
    def build(world: WorldConfig, rng: Stream, split: str, template: str) -> Built:
        scene = sample_scene(world, rng, split=split)
        ask = request(language.CAPTION_REQUESTS, "", rng, template)
        text, spec = words(scene, rng, template)
        return [_image(scene, world), Text(text=ask), _said(text)], _facts(scene, spec)

    return build


def _question(world: WorldConfig, rng: Stream, split: str, template: str) -> Built:
    q = sample_question(world, rng, split=split, template=template)
    facts = {"scene": record(q.scene), "family": q.family, "answer": q.answer, "program": str(q.program)}
    return [_image(q.scene, world), Text(text=q.text), _said(q.answer)], facts


def _check(world: WorldConfig, rng: Stream, split: str, template: str) -> Built:
    scene = _drawn(world, rng, split)
    _, spec = draw_prompt(scene, rng, template)
    ask = rng.choice(questions(spec, world))
    facts = {**_facts(scene, spec), "family": ask.kind, "answer": ask.answer}
    return [_image(scene, world), Text(text=ask.text), _said(ask.answer)], facts


def _drawn(world: WorldConfig, rng: Stream, split: str) -> Scene:
    count = min(max(rng.weighted(DRAW_COUNTS), world.min_objects), world.max_objects)
    if split == "counts":
        count = max(count, min(n for n, _ in world.held_out_counts))
    return sample_scene(world, rng, count=count, split=split)


def _drawn_after(words: Words) -> Build:
    """Drawings that are asked for in these words."""
    def build(world: WorldConfig, rng: Stream, split: str, template: str) -> Built:
        scene = _drawn(world, rng, split)
        text, spec = words(scene, rng, template)
        ask = request(language.DRAW_REQUESTS, text, rng, template)
        return [Text(text=ask), _image(scene, world, True)], _facts(scene, spec)

    return build


def _edit(world: WorldConfig, rng: Stream, split: str, template: str) -> Built:
    before, edit, after, text = sample_edit(world, rng, split=split, template=template)
    facts = {**_facts(before, caption_spec(after)), "after": record(after), "edit": edit.kind, "target": edit.target,
             "changes": edit.changes}
    return [_image(before, world), Text(text=text), _image(after, world, True)], facts


def _refer(world: WorldConfig, rng: Stream, split: str, template: str) -> Built:
    scene, obj, found = sample_reference(world, rng, split=split)
    box = _found(scene, obj)
    ask = Text(text=request(REQUESTS, found.text, rng, template))
    facts = {"scene": record(scene), "target": obj.id, "family": found.kind, "program": str(found.program)}
    return [_image(scene, world), ask, box], facts


def _found(scene: Scene, obj: Object) -> Boxes:
    return Boxes(boxes=np.array([box_of(obj, scene.canvas)], np.float32), role="assistant", target=True)


def _talk(world: WorldConfig, rng: Stream, split: str, template: str) -> Built:
    scene, turns = sample_talk(world, rng, split=split, template=template)
    return _turns(_image(scene, world), scene, turns)


def _turns(shown: Piece, scene: Scene, turns: Sequence[Turn]) -> Built:
    pieces, facts = [shown], []
    for turn in turns:
        said = _found(scene, turn.target) if turn.target is not None else _said(str(turn.answer))
        pieces += [Text(text=turn.text), said]
        goal = {"target": turn.target.id} if turn.target is not None else {"answer": turn.answer}
        facts.append({"kind": turn.kind, "program": str(turn.program), **goal})
    return pieces, {"scene": record(scene), "turns": facts}


def _boxes(scene: Scene, target: bool) -> Boxes:
    order = reading_order(scene)
    return Boxes(boxes=np.array([box_of(o, scene.canvas) for o in order], np.float32), labels=tuple(map(label, order)),
                 role="assistant" if target else "user", target=target)


def _layout(world: WorldConfig, rng: Stream, split: str, template: str) -> Built:
    scene = _drawn(world, rng, split)
    text = f"{request(language.LAYOUT_REQUESTS, '', rng, template)} on a {scene.background} background"
    return [Text(text=text), _boxes(scene, False), _image(scene, world, True)], _facts(scene, caption_spec(scene))


def _plan(world: WorldConfig, rng: Stream, split: str, template: str) -> Built:
    scene = _drawn(world, rng, split)
    text, spec = draw_prompt(scene, rng, template)
    ask = request(language.PLAN_REQUESTS, text, rng, template)
    return [Text(text=ask), _boxes(scene, True), _image(scene, world, True)], _facts(scene, spec)


def _story(world: WorldConfig, rng: Stream, split: str, template: str) -> Built:
    story = sample_story(world, rng, split=split, template=template)
    pieces: list[Piece] = [Text(text=story.premise), _image(story.scenes[0], world, True)]
    for event, scene in zip(story.events, story.scenes[1:], strict=True):
        pieces += [_said(event), _image(scene, world, True)]
    scenes = [record(s) for s in story.scenes]
    facts = {"scene": scenes[0], "scenes": scenes, "spec": claims(story.spec), "family": story.law,
             "events": list(story.events)}
    return pieces, facts


def _tell(world: WorldConfig, rng: Stream, split: str, template: str) -> Built:
    scene = sample_scene(world, rng, split=split)
    text, spec = describe(scene, rng.choice(LEVELS), rng, template)
    return [_said(text)], _facts(scene, spec)


def _read(world: WorldConfig, rng: Stream, split: str, template: str) -> Built:
    q = sample_question(world, rng, split=split, template=template)
    facts = {"scene": record(q.scene), "family": q.family, "answer": q.answer, "program": str(q.program)}
    return [Text(text=caption(q.scene)), Text(text=q.text), _said(q.answer)], facts


def _quiz(world: WorldConfig, rng: Stream, split: str, template: str) -> Built:
    scene, turns = sample_talk(world, rng, split=split, template=template, pointing=False)
    return _turns(Text(text=caption(scene)), scene, turns)


def _judging(kind: str, mode: str) -> Build:
    def build(world: WorldConfig, rng: Stream, split: str, template: str) -> Built:
        case = judging.sample_case(world, rng, kind, count=1 if mode == "point" else 2, split=split, template=template)
        shown = [Image(pixels=p) for p in (*case.given, *(p for c in case.candidates for p in c.pictures))]
        facts: dict[str, Any] = {"scene": record(case.scene), "scores": [list(c.scores) for c in case.candidates]}
        if kind == "answer":
            facts["said"] = [c.text for c in case.candidates]
        if mode == "point":
            said = facts["answer"] = judging.rating(kind, case.candidates[0])
        else:
            said = facts["answer"] = judging.verdict(kind, case.better)
            facts["better"] = case.better
        if mode == "think":
            said = judging.thoughts(case, kind, rng)
        return [*shown, Text(text=judging.request(case, kind, mode, template)), _said(said)], facts

    return build


def _inspect(world: WorldConfig, rng: Stream, split: str, template: str) -> Built:
    found = judging.inspection(world, rng, split=split, template=template)
    scores = [judging.MOST - d for d in found.defects]
    return [Image(pixels=found.picture), Text(text=found.asked), _said(found.said)], {
        **_facts(found.scene, caption_spec(found.scene)), "scores": [scores], "answer": found.said}


TASKS = ("caption", "question", "draw", "edit", "refer", "layout", "plan", "story", "talk")
ABOUT_PROMPTS = ("check",)
LEVELLED = ("caption-short", "draw-short", "draw-long")
TEXT_TASKS = ("tell", "read", "quiz")
JUDGING = tuple(f"{kind}-{mode}" for kind in judging.KINDS for mode in judging.MODES)
_BUILD: dict[str, Build] = {
    "caption": _captioned(_full), "question": _question, "draw": _drawn_after(draw_prompt), "edit": _edit,
    "refer": _refer, "layout": _layout, "plan": _plan, "story": _story, "talk": _talk, "check": _check,
    "caption-short": _captioned(_brief), "draw-short": _drawn_after(_brief), "draw-long": _drawn_after(_full),
    "tell": _tell, "read": _read, "quiz": _quiz, "inspect": _inspect,
    **{f"{kind}-{mode}": _judging(kind, mode) for kind in judging.KINDS for mode in judging.MODES}}


# -- records ----------------------------------------------------------------------------------------------------------

def _facts(scene: Scene, spec: Spec) -> dict[str, Any]:
    return {"scene": record(scene), "spec": claims(spec)}


def record(scene: Scene) -> dict[str, Any]:
    """Equal to `scene.to_dict()`, several times faster: this is half of the cost of a small document otherwise."""
    return {"version": scene.version, "canvas": list(scene.canvas), "background": scene.background,
            "objects": [dict(o.__dict__) for o in scene.objects]}


def claims(spec: Spec) -> dict[str, Any]:
    """As `spec.to_dict()`, with lists: a document is the same after JSON."""
    return {"items": [dict(i.__dict__) for i in spec.items], "relations": [list(r) for r in spec.relations],
            "background": spec.background, "closed": spec.closed}
