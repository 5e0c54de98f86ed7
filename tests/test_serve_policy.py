"""The content policy: an operator's function sees both sides, and nothing gets past it half."""
import sys

import pytest

from diptych.document import Image, Text
from diptych.serve.auth import Keys
from diptych.serve.policy import Check, load_policy
from tests.serving import Local, events, make, png, shown, words

KEY = "a-key-of-some-length"


class Censor:
    """Refuses what it is told to, and remembers what it saw."""

    def __init__(self, side: str = "", kind: type = object) -> None:
        self.side, self.kind = side, kind
        self.seen: list[Check] = []

    def __call__(self, check: Check) -> str | None:
        self.seen.append(check)
        return "not here" if check.side == self.side and isinstance(check.piece, self.kind) else None


def local_with(censor, **how) -> Local:
    return Local(make(policy=censor, **how))


def test_it_sees_both_sides():
    censor = Censor()
    with local_with(censor, keys=Keys({"alice": KEY})) as local:
        body = {"messages": [{"role": "user", "content": [shown(png()), words("draw it")]}], "seed": 1,
                "answer": ["text", "image", "boxes"], "negative_prompt": "a star"}
        answer = local.post("/v1/chat/completions", body, headers={"authorization": f"Bearer {KEY}"})
        assert answer.status_code == 200
    told = [(c.side, type(c.piece).__name__) for c in censor.seen if c.side == "prompt"]
    assert told == [("prompt", "Image"), ("prompt", "Text"), ("prompt", "Text")]
    assert [c.piece.text for c in censor.seen if isinstance(c.piece, Text)][:2] == ["draw it", "a star"]
    assert {"Text", "Image"} <= {type(c.piece).__name__ for c in censor.seen if c.side == "answer"}
    assert {(c.model, c.key) for c in censor.seen} == {("tiny", "alice")}


@pytest.mark.parametrize("kind", [Text, Image])
def test_a_refused_prompt_costs_nothing(kind, monkeypatch):
    with local_with(Censor("prompt", kind)) as local:
        served = local.app.state.context.models.find(None)
        monkeypatch.setattr(served, "submit", lambda asks: pytest.fail("expected nothing to be asked"))
        files = [("image", ("a.png", png(), "image/png"))]
        for answer in (local.chat(shown(png()), words("x")), local.chat(shown(png()), words("x"), stream=True),
                       local.post("/v1/images/edits", files=files, data={"prompt": "x"})):
            error = answer.json()["error"]
            assert answer.status_code == 400 and error["code"] == "content_policy_violation"
            assert "not here" in error["message"]


def test_labels_of_boxes_are_words_too():
    with local_with(lambda c: "no" if isinstance(c.piece, Text) and c.piece.text == "gun" else None) as local:
        assert local.draw("", boxes=[{"label": "gun", "box": [0, 0, 1, 1]}]).status_code == 400


def test_a_refused_answer_is_withheld():
    with local_with(Censor("answer", Text)) as local:
        [choice] = local.chat(words("hello"), seed=1).json()["choices"]
        assert choice["finish_reason"] == "content_filter"
        assert choice["message"]["content"] is None and choice["message"]["refusal"] == "not here"
        told = [d["choices"][0] for _, d in events(local.chat(words("hello"), seed=1, stream=True).text) if d]
        assert [c["delta"].get("content") for c in told] == ["", None], "not even the first letters"
        assert told[-1]["finish_reason"] == "content_filter" and told[-1]["delta"]["refusal"] == "not here"
    with local_with(Censor("answer", Image)) as local:
        answer = local.draw()
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "content_policy_violation"
        told = events(local.draw(stream=True, partial_images=2, num_inference_steps=6).text)
        assert [name for name, _ in told] == ["error"] and "b64_json" not in str(told)
        mixed = local.chat(words("x"), seed=1, modalities=["text", "image"], stream=True)
        assert "image/png" not in mixed.text and "content_filter" in mixed.text


def test_streams_wait_for_the_whole_piece():
    with local_with(Censor()) as local:
        asked = {"seed": 1, "answer": ["text", "image", "text"]}
        whole = local.chat(words("hello"), **asked).json()["choices"][0]["message"]
        told = [d["choices"][0]["delta"] for _, d in events(local.chat(words("hello"), **asked, stream=True).text) if d]
        texts = [d["content"] for d in told if d.get("content")]
        assert "".join(texts) == whole["content"] and len(texts) <= 2
        assert [i for d in told for i in d.get("images", ())] == whole["images"]


def test_a_policy_that_fails_lets_nothing_pass():
    with local_with(lambda check: 1 / 0) as local:
        answer = local.chat(words("hello"))
        assert answer.status_code == 500 and "division" not in answer.text


def test_a_policy_is_loaded_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_policy.py").write_text("def check(c):\n    return None\nvalue = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_policy("my_policy:check")(None) is None  # type: ignore[arg-type]
    for spec, told in (("my_policy", "module:function"), ("my_policy:value", "a function"), ("nope:x", "a module"),
                       ("my_policy:nope", "a function"), (":x", "module:function")):
        with pytest.raises(ValueError, match=told):
            load_policy(spec)
