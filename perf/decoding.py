"""Decoding code by code and word by word beside `transformers`, on the same weights: `python perf/decoding.py`.

Janus of random weights at three sizes in bfloat16: pictures of 576 codes with guidance, and 128 words. Both sides take
turns, and a figure is the best of the rounds; ratios are of the same round. int8 is Diptych with copies of the matrices
in eight bits. The limit is the time of reading every weight of a step once at the bandwidth that a plain sum over a
gibibyte reaches on all threads. First, at the smallest size in float32 and without sampling, both must give the same
codes and words.

    --sizes 5M 91M 1.4B    --batches 1 4 16    --rounds 3    --threads N    --codes 576    --words 128
"""
import argparse
import json
import os
import platform
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from diptych.adapters.convert import export
from diptych.adapters.janus import config_of
from diptych.document import Document, Image, Text
from diptych.objectives.next_token import TextSampling, TokenSampling
from diptych.parts.interleave import Marks
from diptych.parts.vocabulary import Vocabulary
from diptych.systems.decoding import Decoding
from diptych.systems.janus import WORLD_MARKS, Janus
from diptych.systems.works import Read, Together

GOLDEN = Path(__file__).parents[1] / "tests" / "goldens" / "janus" / "config.json"
# width, layers, network, heads, words, codes
SIZES = {"5M": (256, 6, 640, 4, 4096, 4096), "91M": (768, 12, 2048, 12, 16384, 16384),
         "1.4B": (2048, 24, 5632, 16, 102400, 16384)}
ASK = Document((Text(text="a large red ball to the left of a small blue box on a white floor"), Image(target=True)))
SAY = Document((Text(text="tell me all that you know about red balls"), Text(target=True)))


def make(size: str, codes: int) -> Janus:
    width, depth, hidden, heads, words, values = SIZES[size]
    about = json.loads(GOLDEN.read_text())
    about["language_config"] |= {"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": depth,
                                 "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": words,
                                 "max_position_embeddings": 4096}
    for part in ("aligner", "gen_aligner", "gen_head"):
        about[f"{part}_config"]["params"]["n_embed"] = width
    about["gen_head_config"]["params"] |= {"image_token_embed": width, "image_token_size": values}
    about["gen_vision_config"]["params"]["image_token_size"] = values
    patch = about["_extra_sizes"]["vision_tower"]["patch_size"]
    side = round(codes**0.5) * patch
    about["vision_config"]["params"]["image_size"] = about["_extra_sizes"]["vision_tower"]["image_size"] = side
    config = replace(config_of(about), mark_names=WORLD_MARKS)
    vocabulary = Vocabulary("zoo/tokenizer", marks=WORLD_MARKS)
    marks = Marks(vocabulary.start, vocabulary.end, vocabulary.image_start, vocabulary.image_end)
    torch.manual_seed(0)
    config = replace(config, marks=marks, pad=0, turns=None)
    side = round(codes**0.5) * config.codec.downsample
    return Janus(replace(config, picture=(side, side)), vocabulary).eval()


def theirs_of(model: Janus, at: Path, dtype: torch.dtype) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    export(model, at, layout="huggingface")
    made = transformers.JanusForConditionalGeneration.from_pretrained(at, dtype=dtype).eval()
    vars(made.generation_config)["generation_kwargs"] = {"boi_token_id": model.marks.image_start}
    made.model.vision_model.config.num_image_tokens = (model.config.picture[0] // model.stride) ** 2
    return made


def ids_of(model: Janus, document: Document) -> list[int]:
    """What the context of the prompt reads, up to what is asked for."""
    program = model.program(document, model.default_sampling(), torch.Generator(), lambda event: None)
    work, ids, first = next(program), list[int](), None
    while True:
        leaves = work.works if isinstance(work, Together) else [work]
        reads = [w for w in leaves if isinstance(w, Read)]
        first = first or reads[0].reader
        ids += [i for w in reads if w.reader is first for i in w.writer.ids]
        if isinstance(work, Together) or reads[0].predict:
            return ids
        work = program.send(model.run([work])[0])


def draw_ours(model: Janus, batch: int, sample: bool) -> tuple[float, Tensor]:
    sampling = replace(model.default_sampling(), codes=TokenSampling(temperature=float(sample)))
    caught: list[Tensor] = []
    decode, begun = model.decode, time.perf_counter()
    spent: list[float] = []

    def listening(x: Tensor, grid: tuple[int, int]) -> Tensor:
        spent.append(time.perf_counter() - begun)  # codes are there; pixels are not what is compared
        caught.append(x)
        return decode(x, grid)

    model.decode = listening  # type: ignore[method-assign]
    try:
        model.generate([ASK] * batch, sampling, seeds=list(range(batch)))
    finally:
        del model.decode
    return spent[0], torch.cat(caught)


def draw_theirs(model: Any, ids: list[int], batch: int, sample: bool) -> tuple[float, Tensor]:
    at = torch.tensor([ids] * batch)
    begun = time.perf_counter()
    codes = model.generate(input_ids=at, attention_mask=torch.ones_like(at), generation_mode="image", do_sample=sample,
                           guidance_scale=5.0, pad_token_id=0, bos_token_id=ids[0], use_cache=True,
                           max_length=len(ids) + 1)
    return time.perf_counter() - begun, codes


def say_ours(model: Janus, batch: int, count: int) -> tuple[float, Tensor]:
    from diptych.objectives import next_token

    sampling = replace(model.default_sampling(), text=TextSampling(max_tokens=count))
    said: list[int] = []
    draw = next_token.draw

    def listening(*args: Any) -> int:
        said.append(draw(*args))
        return said[-1]

    next_token.draw = listening
    try:
        begun = time.perf_counter()
        model.generate([SAY] * batch, sampling)
        spent = time.perf_counter() - begun
    finally:
        next_token.draw = draw
    return spent, torch.tensor(said).view(-1, batch).T  # row by row in every step


def say_theirs(model: Any, ids: list[int], batch: int, count: int) -> tuple[float, Tensor]:
    at = torch.tensor([ids] * batch)
    begun = time.perf_counter()
    out = model.generate(input_ids=at, attention_mask=torch.ones_like(at), do_sample=False, min_new_tokens=count,
                         max_new_tokens=count, pad_token_id=0, eos_token_id=None, use_cache=True)
    return time.perf_counter() - begun, out[:, len(ids):]


def bandwidth() -> float:
    """Bytes per second."""
    x, best = torch.ones(1 << 28), 0.0
    for _ in range(5):
        begun = time.perf_counter()
        x.sum()
        best = max(best, x.nbytes / (time.perf_counter() - begun))
    return best


def weights_of(model: Janus, drawing: bool) -> int:
    """Numbers that one step reads."""
    head = model.code_head if drawing else model.head
    return sum(p.numel() for part in (model.trunk, head) for p in part.parameters())


def check(at: Path) -> None:
    model = make("5M", 64)
    theirs = theirs_of(model, at, torch.float32)
    with torch.no_grad():
        ask, say = ids_of(model, ASK), ids_of(model, SAY)
        ours, others = draw_ours(model, 2, False)[1], draw_theirs(theirs, ask, 2, False)[1]
        words, said = say_ours(model, 2, 32)[1], say_theirs(theirs, say, 2, 32)[1]
    print(f"same codes: {bool((ours.flatten(1) == others).all())}, same words: {bool((words == said).all())} "
          "(float32, greedy)\n", flush=True)


def measure(size: str, args: argparse.Namespace, limit: float, at: Path) -> None:
    model = make(size, args.codes).bfloat16()
    theirs = theirs_of(model, at, torch.bfloat16)
    ask, say = ids_of(model, ASK), ids_of(model, SAY)
    for model.int8 in (False, True):
        Decoding.of(model)  # copies of the weights are not made in what is timed
    for kind, per in (("codes", args.codes), ("words", args.words)):
        def ours(batch: int, int8: bool, kind: str = kind) -> float:
            model.int8 = int8
            return draw_ours(model, batch, True)[0] if kind == "codes" else say_ours(model, batch, args.words)[0]

        def other(batch: int, kind: str = kind) -> float:
            return draw_theirs(theirs, ask, batch, True)[0] if kind == "codes" \
                else say_theirs(theirs, say, batch, args.words)[0]

        for batch in args.batches:
            rounds: list[tuple[float, ...]] = []
            for n in range(args.rounds + 1):
                took = (other(batch), ours(batch, False), ours(batch, True))
                rounds += [took] if n or size == "1.4B" else []  # the first warms up
                if size == "1.4B" and n + 1 >= args.rounds:
                    break
            best = [per * batch / min(r[i] for r in rounds) for i in range(3)]
            ratio = [median(r[0] / r[i] for r in rounds) for i in (1, 2)]
            floor = weights_of(model, kind == "codes") / limit  # of a step with one byte per weight
            above = [batch / best[1] / (2 * floor), batch / best[2] / floor]
            print(f"| {size} | {kind} | {batch} | {best[0]:,.1f} | {best[1]:,.1f} | **{ratio[0]:.2f}x** "
                  f"| {above[0]:.2f}x | {best[2]:,.1f} | **{ratio[1]:.2f}x** | {above[1]:.2f}x |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    for name, default in (("rounds", 3), ("threads", os.cpu_count()), ("codes", 576), ("words", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    import transformers

    torch.set_num_threads(args.threads)
    limit = bandwidth()
    print(f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, "
          f"transformers {transformers.__version__}; a sum reads {limit / 1e9:.1f} GB/s")
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder) / "check")
        print("| size | what | batch | transformers, per second | Diptych | ratio | of the limit's time | int8 | ratio "
              "| of the limit's time |\n|---|---|---|---|---|---|---|---|---|---|")
        with torch.no_grad():
            for size in args.sizes:
                measure(size, args, limit, Path(folder) / size)


if __name__ == "__main__":
    main()
