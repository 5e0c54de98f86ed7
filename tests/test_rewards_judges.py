"""Rewards that ask: contrastive encoders, the model itself, reward models, a judge behind an endpoint."""
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diptych import zoo
from diptych.adapters import parity, unified_reward_text_cases
from diptych.alignment.rewards import verdicts
from diptych.alignment.rewards.asking import AskSystem
from diptych.alignment.rewards.base import Failure, check_independent
from diptych.alignment.rewards.cache import Cached
from diptych.alignment.rewards.endpoint import Endpoint, EndpointError
from diptych.alignment.rewards.judges import Format, PairJudge, PointJudge, Tagged, find_template
from diptych.alignment.rewards.mining import contest
from diptych.alignment.rewards.questions import SelfQuestions, questions
from diptych.alignment.rewards.similarity import ImageSimilarity, TextSimilarity
from diptych.document import Document, Image, Text
from diptych.systems.base import Sampling, System
from diptych.world import programs, tasks
from diptych.world.scene import Scene

GOLDENS = Path(__file__).parent / "goldens"


class Replying(System):
    """Says what a function of the question says."""

    def __init__(self, reply: Callable[[Document], str]) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.reply, self.seen = reply, list[Document]()

    def generate(self, documents: Sequence[Document], sampling: Sampling | None = None, **kwargs: Any
                 ) -> list[Document]:
        self.seen += documents
        return [Document((*d.pieces[:-1], d.pieces[-1].replace(text=self.reply(d)))) for d in documents]


def drawings(count: int, level: float = 0.0) -> tuple[list[Document], list[Document]]:
    """The same prompt, drawn in so many shades."""
    asked = Document((Text(text="a red circle"), Image(role="assistant", target=True)), "draw")
    shades = [np.full((3, 8, 8), level + i / 10, np.float32) for i in range(count)]
    return [asked] * count, [Document((asked.pieces[0], asked.pieces[1].replace(pixels=s))) for s in shades]


def shade(document: Document, number: int = 0) -> float:
    return float(document.of(Image)[number].pixels[0, 0, 0])


# -- contrastive ------------------------------------------------------------------------------------------------------

def test_similarity_prefers_the_own_caption_and_the_own_picture() -> None:
    true = [tasks.document("caption", i) for i in range(6)]
    asked = [Document((Text(text=d.of(Text)[-1].text), Image(role="assistant", target=True)), "draw") for d in true]
    made = [Document((a.pieces[0], a.pieces[1].replace(pixels=d.of(Image)[0].pixels)))
            for a, d in zip(asked, true, strict=True)]
    own = [s.value for s in TextSimilarity()(asked, made)]
    swapped = [Document((m.pieces[0], made[i - 1].pieces[1])) for i, m in enumerate(made)]
    others = [s.value for s in TextSimilarity()(asked, swapped)]
    assert sum(o > x for o, x in zip(own, others, strict=True)) >= 5
    images = torch.stack([torch.from_numpy(d.of(Image)[0].pixels) for d in true])
    cosines = zoo.load("clip").similarity(images, [a.of(Text)[0].text for a in asked]).diagonal()
    assert own == pytest.approx(cosines.tolist(), abs=1e-5)
    # what is said of a given picture: the same pair
    said = TextSimilarity()(true, true)
    assert [s.value for s in said] == pytest.approx(own, abs=1e-5)
    reference = ImageSimilarity()(made, made)
    assert min(s.value for s in reference) > 0.999
    assert max(s.value for s in ImageSimilarity()(made, swapped)) < 0.99
    assert ImageSimilarity()(asked, made)[0].failure == "no drawing with a reference"
    endless = Document((Text(text="red circle " * 300), made[0].pieces[1]))
    long, short = TextSimilarity()([asked[0]] * 2, [endless, made[0]])
    assert "at most 96 tokens" in long.failure and short.value == pytest.approx(own[0], abs=1e-5)


def test_encoders_are_told_apart() -> None:
    class Mean(torch.nn.Linear):
        def encode_image(self, images: Tensor) -> Tensor:
            return torch.nn.functional.normalize(images.mean((2, 3)), dim=-1)

        def encode_text(self, texts: Sequence[str]) -> Tensor:
            return torch.eye(3)[[len(t) % 3 for t in texts]]

    with pytest.raises(ValueError, match="name of an encoder"):
        TextSimilarity(Mean(1, 1))
    own = TextSimilarity(Mean(1, 1), name="mean", side=4)
    asked, made = drawings(2, 0.5)
    assert own(asked, made)[0].value == pytest.approx(3**-0.5) and own.identity != TextSimilarity().identity
    check_independent(own, TextSimilarity())
    with pytest.raises(ValueError, match="clip-text mean as both"):
        check_independent(own, TextSimilarity(Mean(1, 1), name="mean", side=8))


# -- self-VQA ---------------------------------------------------------------------------------------------------------

def test_questions_about_a_prompt_are_true_of_its_scene() -> None:
    kinds = set()
    for i in range(60):
        document = tasks.document("draw", i)
        true = Scene.from_dict(document.meta["scene"])
        found = questions(document)
        kinds |= {q.kind for q in found}
        for q in found:
            if q.kind in ("exist", "absent"):
                words = q.text.removeprefix("is there ").removesuffix(" ?").split()[1:]
                names = {"small": "size", "medium": "size", "large": "size"}
                given = {names.get(w, "shape" if w == words[-1] else "color"): w for w in words}
                held = programs.answer(programs.call("exist", programs.chain(programs.SCENE, **given)), true)
                assert held == q.answer, (q, true)
            elif q.kind == "count":
                assert q.answer in programs.NUMBERS and q.text.startswith("how many")
    assert kinds == {"exist", "count", "color", "place", "relation", "absent"}


def test_the_model_answers_about_its_own_drawing() -> None:
    asked = [tasks.document("draw", i) for i in range(3)]
    model = Replying(lambda d: " yes ")
    reward = SelfQuestions(model)
    scores = reward([a.prompt() for a in asked], asked)
    for a, s in zip(asked, scores, strict=True):
        wanted = [q.answer == "yes" for q in questions(a)]
        assert s.value == pytest.approx(sum(wanted) / len(wanted)) and s.parts["exist"] == 1 and s.parts["absent"] == 0
    assert model.seen[0].of(Image)[0].pixels is asked[0].of(Image)[0].pixels
    assert not any(p.target for p in model.seen[0].of(Image))
    one = Replying(lambda d: "yes")
    SelfQuestions(one, most=1)(asked, asked)
    assert len(one.seen) == 3
    assert not reward.facts.fixed and SelfQuestions(one, most=1).facts.calls == 1
    with pytest.raises(ValueError, match="whose values stay"):
        Cached(reward)


# -- reward models ----------------------------------------------------------------------------------------------------

def test_a_point_judge_reads_strictly_and_keeps_its_range() -> None:
    asked, made = drawings(3)
    replies = {0.0: "dog (animal): 1\nFinal Score: 4.5", 0.1: "Final Score: 9", 0.2: "rather good"}
    model = Replying(lambda d: replies[round(shade(d), 1)])
    reward = PointJudge(model)
    good, over, none = reward(asked, made)
    assert good.value == 4.5 and "another form" in over.failure and "rather good" in none.failure
    assert (reward.facts.low, reward.facts.high, reward.facts.fixed) == (1, 5, True)
    assert '"a red circle"' in model.seen[0].of(Text)[0].text
    answers = PointJudge(Replying(lambda d: "Final Score: 70"), "answer-point")
    caption = tasks.document("caption", 0)
    assert answers([caption], [caption])[0].value == 70 and answers.facts.high == 100
    told = answers.ask.system.seen[0]  # type: ignore[attr-defined]
    assert caption.of(Text)[-1].text in told.of(Text)[0].text and len(told.of(Image)) == 1
    with pytest.raises(ValueError, match="expected a template out of draw-point"):
        PointJudge(model, "nothing")


def test_pairs_are_judged_in_both_orders() -> None:
    asked, made = drawings(4)
    right = Replying(lambda d: f"Image {1 + (shade(d, 1) > shade(d, 0))} is better")
    reward = PairJudge(right)
    assert [s.value for s in reward(asked, made)] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert len(right.seen) == 12 and "group" in reward.facts.needs and not reward.facts.fixed
    first = PairJudge(Replying(lambda d: "Image 1 is better"))(asked, made)  # prefers a place: says nothing
    assert [s.value for s in first] == [0.5] * 4 and first[0].parts["ties"] == 1
    few = PairJudge(Replying(lambda d: "Both images are equally good"), opponents=1)
    assert few(asked, made)[0].parts == {"meetings": 2, "ties": 1}
    half = Replying(lambda d: "Image 1 is better" if shade(d, 0) < shade(d, 1) else "hm")
    assert [s.value for s in PairJudge(half)(asked[:2], made[:2])] == [1, 0]  # one order was read
    alone = PairJudge(right)([asked[0], tasks.document("draw", 1)], [made[0], tasks.document("draw", 1)])
    assert all("no other answer" in s.failure for s in alone)
    think = find_template("draw-think")
    assert think.read("<think>x</think><answer>Image 2 is better</answer>") == 2
    assert think.read("Image 2 is better") is None


def test_mining_takes_the_best_winner_and_the_worst_loser() -> None:
    asked, made = drawings(6)
    pairs = PairJudge(Replying(lambda d: f"Image {1 + (shade(d, 1) > shade(d, 0))} is better"))
    points = PointJudge(Replying(lambda d: f"Final Score: {1 + 5 * shade(d):.2f}"))
    groups = [(asked[0], made), (asked[0], made[2:])]
    first, second = [c.pair() for c in contest(groups, pairs, points)]
    assert first is not None and (first.chosen, first.rejected, first.decided) == (5, 0, 3)
    assert second is not None and (second.chosen, second.rejected, second.decided) == (3, 0, 2)
    flat = PointJudge(Replying(lambda d: "Final Score: 3"))
    assert contest(groups[:1], pairs, flat)[0].pair() is None
    [tied] = contest(groups[:1], PairJudge(Replying(lambda d: "Image 1 is better")), points)
    assert tied.won == () and tied.pair() is None and len(tied.scores) == 6
    with pytest.raises(ValueError, match="even number"):
        contest([(asked[0], made[:3])], pairs, points)


def test_rewards_of_thinking_judges() -> None:
    true = Document((Text(text="?"), Text(text="Image 1 is better", role="assistant", target=True)))
    texts = ["<think>a</think>\n<answer>Image 1 is better</answer>", "Image 1 is better.", "<answer>Image 2</answer>"]
    made = [Document((true.pieces[0], true.pieces[1].replace(text=t))) for t in texts]
    assert [s.value for s in Format()([true] * 3, made)] == [1, 0, 0]
    assert [s.value for s in Tagged()([true] * 3, made)] == [1, 0, 0]
    assert [s.value for s in Tagged(lenient=True)([true] * 3, made)] == [1, 1, 0]
    assert Tagged()([true.prompt()], made[:1])[0].failure
    totals = "<think>Total score:\nImage 1: 9+8=17\nImage 2: 7+8=15\n</think><answer>Image {} is better</answer>"
    assert verdicts.supported(totals.format(1)) is True and verdicts.supported(totals.format(2)) is False
    assert verdicts.supported("<answer>Image 1 is better</answer>") is None


@pytest.mark.parametrize("text, value", [
    ("Final Score: 4", 4), ("Final Score: 4.5", 4.5), ("Final Score: 1-5 scale: 4", 4), ("Final score: 3/5", 3),
    ("Final Score: 5 out of 5", 5), ("Final Score: 9", None), ("Final Score: 2 ... Final Score: **3**", 3),
    ("Score: 3", None), ("Final Score: -3", None), ("**Final Score:** 2", 2), ("Final Score:\n\n 2", 2),
    ("Final Score: 2 or 3", None), ("Final Score: nine", None)])
def test_a_score_is_the_one_number_in_its_range(text: str, value: float | None) -> None:
    assert verdicts.point(text, 1, 5) == value


def test_verdicts_and_axes_read_strictly() -> None:
    said = {"Image 2 is better than Image 1": 2, "image 2 is better": 2, "Both images are equally good.": 0, "": None,
            "I first thought Image 2 is better, but Image 1 is better": 1, "Overall Judgment: Answer 2 is better.": 2}
    assert {text: verdicts.pair(text) for text in said} == said
    lines = "Alignment Score (1-5): 2.6947\nCoherence Score (1-5): 3\nStyle Score (1-5): {}"
    assert verdicts.axes(lines.format(4.5)) == {"Alignment": 2.6947, "Coherence": 3.0, "Style": 4.5}
    assert verdicts.axes(lines.format(7)) is None and verdicts.axes("Style Score (1-5): 2") is None


@pytest.mark.parametrize("name", ["unified-reward"])
def test_parity_of_the_published_readers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = parity.run(name, GOLDENS / name)
    assert len(cases) >= 50 and all(c.passed for c in cases)
    monkeypatch.setattr(verdicts, "published_pair_generation", lambda text, kind="Image": 1)
    assert not all(c.passed for c in parity.run(name, GOLDENS / name))


def test_parity_of_thinking_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = unified_reward_text_cases.text_cases(GOLDENS / "unified-reward-think")
    assert len(cases) >= 50 and all(c.passed for c in cases)
    monkeypatch.setattr(verdicts, "FRAMES", 6)
    assert not all(c.passed for c in unified_reward_text_cases.text_cases(GOLDENS / "unified-reward-think"))


# -- a judge behind an endpoint ---------------------------------------------------------------------------------------

class Server(HTTPServer):
    """Answers by a list of (status, body); the last one for ever. Keeps what it was asked."""

    answers: list[tuple[int, Any]]
    asked: list[tuple[str, dict[str, str], dict[str, Any]]]
    lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            answers = self.server.answers
            status, answer = answers.pop(0) if len(answers) > 1 else answers[0]
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server(("127.0.0.1", 0), Handler)
    found.asked = []
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


def completion(text: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def endpoint(server: Server, **options: Any) -> Endpoint:
    return Endpoint(url=f"http://127.0.0.1:{server.server_port}/v1", **{"model": "judge", "wait": 0.01, **options})


@pytest.mark.parametrize("client", ["httpx", "urllib"])
def test_an_endpoint_judges(server: Server, client: Any) -> None:
    server.answers = [(503, b"later"), (429, b"later"), (200, completion("Final Score: 4"))]
    judge = endpoint(server, client=client, key="secret", parallel=1)
    asked, made = drawings(2)
    reward = PointJudge(judge)
    assert [s.value for s in reward(asked, made)] == [4, 4] and len(server.asked) == 4
    path, headers, body = server.asked[-1]
    assert path == "/v1/chat/completions" and headers["authorization"] == "Bearer secret"
    assert body["model"] == "judge" and body["temperature"] == 0 and len(body["messages"]) == 1
    kinds = [part["type"] for part in body["messages"][0]["content"]]
    assert kinds == ["image_url", "text"]  # the empty reply is not sent
    assert "secret" not in repr(judge) + reward.identity
    server.answers = [(200, completion([{"type": "text", "text": "Final Score: 2"}]))]
    assert reward(asked, made)[0].value == 2


@pytest.mark.parametrize("client", ["httpx", "urllib"])
def test_endpoints_fail_clearly(server: Server, client: Any) -> None:
    asked, made = drawings(2)
    server.answers = [(401, b"bad key")]
    with pytest.raises(EndpointError, match="status 401: bad key; fix: check the address"):
        PointJudge(endpoint(server, client=client))(asked, made)
    assert len(server.asked) <= 2  # not tried again
    server.answers = [(500, b"broken")]
    with pytest.raises(EndpointError, match="expected replies of judge at .* got none: no reply after 2 tries"):
        PointJudge(endpoint(server, client=client, retries=1))(asked, made)
    server.answers = [(200, b"<html>"), (200, completion("Final Score: 3"))]
    scores = PointJudge(endpoint(server, client=client, parallel=1))(asked, made)
    assert "no chat completion" in scores[0].failure and scores[1].value == 3
    port = server.server_port
    server.shutdown()
    server.server_close()
    gone = Endpoint(url=f"http://127.0.0.1:{port}/v1", model="judge", retries=1, wait=0.01, timeout=2, client=client)
    with pytest.raises(EndpointError, match="fix: check that it runs"):
        gone([made[0]])
    with pytest.raises(ValueError, match="address of an endpoint"):
        Endpoint(url="localhost", model="x")


def test_systems_are_named_by_their_weights() -> None:
    torch.manual_seed(0)
    one, two = (Replying(lambda d: "yes") for _ in range(2))
    one.layer, two.layer = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert AskSystem(one).name != AskSystem(two).name and AskSystem(one).name == AskSystem(one).name
    assert AskSystem(one, fixed=False).name == "Replying"
    assert isinstance(Failure("x").reason, str)
