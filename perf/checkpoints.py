"""Peak memory of reading and writing a published checkpoint, in sizes of its weights: `python perf/checkpoints.py`.

A Janus of random weights in bfloat16, 2.0 GiB in two shards, is made in a temporary folder (three times its size in
all). Every operation runs in a process of its own; what that held after importing the code and reading a tiny
checkpoint is subtracted. Linux only.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from diptych.adapters import convert, published
from diptych.adapters.janus import config_of, rules
from diptych.adapters.keys import to_theirs
from diptych.systems.io import load_system, system_tensors
from diptych.systems.janus import Janus

TINY = Path(__file__).parents[1] / "tests" / "goldens" / "janus"
WORK = {
    "load, safetensors": lambda at: published.load(at / "large", dtype=None),
    "load, torch file": lambda at: published.load(at / "torch", dtype=None),
    "import": lambda at: convert.import_folder(at / "large", at / "ours"),
    "load what was imported": lambda at: load_system(at / "ours", dtype=None),
    "export what was imported": lambda at: convert.export_folder(at / "ours", at / "back"),
    "export in another layout": lambda at: convert.export_folder(at / "ours", at / "other", layout="huggingface"),
}


def resident(name: str) -> int:
    """VmRSS (now) or VmHWM (the peak), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def make(at: Path) -> int:
    """Both forms of the checkpoint; the bytes of its weights."""
    values = json.loads((TINY / "config.json").read_text())
    values["language_config"] |= {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 14,
                                  "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 102400}
    for part in ("aligner", "gen_aligner", "gen_head"):
        values[f"{part}_config"]["params"]["n_embed"] = 2048
    values["gen_head_config"]["params"]["image_token_embed"] = 2048
    c = config_of(values)
    with torch.device("meta"):
        shapes = to_theirs(system_tensors(Janus(c)), rules(c))
    tensors = {k: torch.full(v.shape, 0.5, dtype=torch.bfloat16) for k, v in shapes.items()}
    for form in ("large", "torch"):
        (at / form).mkdir()
        (at / form / "config.json").write_text(json.dumps(values))
    names = sorted(tensors)
    homes = {name: f"model-0000{1 + 2 * i // len(names)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(homes.values())):
        save_file({k: tensors[k] for k in names if homes[k] == file}, at / "large" / file, metadata={"format": "pt"})
    (at / "large" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    torch.save(tensors, at / "torch" / "pytorch_model.bin")
    return sum(v.nbytes for v in tensors.values())


def one(name: str, at: Path) -> int:
    """Bytes that an operation took at its peak."""
    published.load(TINY, dtype=None)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    kept = WORK[name](at)
    taken = resident("VmHWM") - before
    del kept
    return taken


def main() -> None:
    if len(sys.argv) > 1:
        print(one(sys.argv[1], Path(sys.argv[2])))
        return
    with tempfile.TemporaryDirectory() as folder:
        size = make(Path(folder))
        print(f"torch {torch.__version__}, weights {size / 2**30:.2f} GiB")
        for name in WORK:
            done = subprocess.run([sys.executable, __file__, name, folder], capture_output=True, text=True, check=True)
            print(f"{name:<28} {int(done.stdout.split()[-1]) / size:.2f}", flush=True)


if __name__ == "__main__":
    main()
