"""What `diptych plan` predicts against what then happens: `python perf/plan.py`.

Generations: bundled `mini`, and Janus of random weights at the sizes of `perf/decoding.py`, saved to a temporary
folder. Trainings: some recipes of the library cut to `--steps` steps per stage. Prediction and run each have a process
of their own, whose peak is its largest resident set; the time of a generation is that of the second of two equal runs,
as a service would see it, and of a training that of the whole command. Words of an answer: as many as it then had.

    --models mini 91M ...    --recipes janus ...    --steps N    --numbers 1 4
"""
import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from diptych.cli.common import ENVIRONMENT

MODELS = ("mini", "5M", "91M", "1.4B")
RECIPES = ("bagel", "janus", "show-o", "harmon", "emu3")


def child(*arguments: object) -> dict[str, Any]:
    """What a process of this file prints."""
    done = subprocess.run([sys.executable, __file__, "--child", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def opened(folder: str, dtype: str) -> Any:
    from diptych.adapters.published import open_model

    return open_model(Path(folder), dtype=getattr(torch, dtype))


def forecast(folder: str, verb: str, number: str, dtype: str, words: str) -> dict[str, Any]:
    from diptych.cli.plan import document
    from diptych.engine.forecast import forecast
    from diptych.training.memory import peak_memory

    system = opened(folder, dtype)
    documents = [document(system, verb, n) for n in range(int(number))]
    forecast(system, documents, words=int(words))
    begun = time.perf_counter()
    found = forecast(system, documents, words=int(words))
    return {"seconds": found.seconds, "memory": peak_memory(system.device), "spent": time.perf_counter() - begun}


def real(folder: str, verb: str, number: str, dtype: str, words: str) -> dict[str, Any]:
    from diptych.cli.plan import document
    from diptych.document import Text
    from diptych.training.memory import peak_memory

    system = opened(folder, dtype)
    sampling = system.default_sampling()
    sampling = dataclasses.replace(sampling, text=dataclasses.replace(sampling.text, max_tokens=int(words)))
    documents = [document(system, verb, n) for n in range(int(number))]
    for _ in range(2):
        begun = time.perf_counter()
        made = system.generate(documents, sampling)
        seconds = time.perf_counter() - begun
    texts = [len(system.vocabulary.encode(t.text)) for d in made for t in d.of(Text)[-1:]]
    return {"seconds": seconds, "memory": peak_memory(system.device), "words": max(texts, default=1)}


def make(size: str, folder: Path) -> None:
    from decoding import make as janus

    from diptych.systems.io import save_system

    save_system(janus(size, 576).bfloat16(), folder)


def generations(models: list[str], numbers: list[int]) -> None:
    print("| model | task | at once | seconds | predicted | MiB | predicted | the plan took |\n|" + "---|" * 8)
    with tempfile.TemporaryDirectory() as at:
        for name in models:
            folder, dtype = name, "float32"
            if name != "mini":
                folder, dtype = str(Path(at) / name), "bfloat16"
                subprocess.run([sys.executable, __file__, "--child", "make", name, folder], check=True)
            for verb in ("draw", "caption"):
                for number in numbers:
                    ran = child("real", folder, verb, number, dtype, 32)
                    told = child("forecast", folder, verb, number, dtype, min(ran["words"] + 1, 32))
                    times, peaks = (told[k] / ran[k] - 1 for k in ("seconds", "memory"))
                    print(f"| {name} | {verb} | {number} | {ran['seconds']:.2f} | {times:+.0%} "
                          f"| {ran['memory'] / 2**20:.0f} | {peaks:+.1%} | {told['spent']:.1f} s |", flush=True)


def trainings(recipes: list[str], steps: int) -> None:
    from diptych import config
    from diptych.cli.common import find_recipe
    from diptych.training.recipe import load_recipe
    from diptych.training.rehearse import rehearse

    print("| recipe | steps | seconds | predicted | MiB | predicted |\n|" + "---|" * 6)
    for name in recipes:
        recipe = load_recipe(find_recipe(name))
        stages = tuple(dataclasses.replace(s, steps=min(s.steps, steps), warmup=min(s.warmup, steps))
                       for s in recipe.stages)
        recipe = dataclasses.replace(recipe, stages=stages)
        told = rehearse(recipe)
        with tempfile.TemporaryDirectory() as at:
            config.save(recipe, Path(at) / "recipe.yaml")
            begun = time.perf_counter()
            command = [sys.executable, "-m", "diptych", "train", f"{at}/recipe.yaml", "--run", f"{at}/run"]
            run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _, status, used = os.wait4(run.pid, 0)
            seconds = time.perf_counter() - begun
            if status:
                raise SystemExit(f"{name}: training ended with {status}")
        print(f"| {name} | {recipe.steps} | {seconds:.1f} | {told.seconds / seconds - 1:+.0%} "
              f"| {used.ru_maxrss / 1024:.0f} | {told.memory / 1024 / used.ru_maxrss - 1:+.1%} |", flush=True)


def main() -> None:
    os.environ.update(ENVIRONMENT)
    if sys.argv[1:2] == ["--child"]:
        name, *rest = sys.argv[2:]
        if name == "make":
            make(rest[0], Path(rest[1]))
        else:
            print(json.dumps({"forecast": forecast, "real": real}[name](*rest)))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--numbers", nargs="*", type=int, default=[1, 4])
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    if args.models:
        generations(args.models, args.numbers)
    if args.recipes:
        print()
        trainings(args.recipes, args.steps)


if __name__ == "__main__":
    main()
