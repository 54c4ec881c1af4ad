"""Measure how the cost of a start grows with rows: seconds, memory and files, for several losses and sizes.

    python experiments/benchmarks/rows.py runs/rows --rows 1000 10000 100000 1000000 --zeros

A row is a prompt with two scored responses of about 35 bytes, and the model is a tiny random one that costs nothing.
Each measurement is a command `train.py … trainer.max_steps=1`: first with empty caches, which includes reading,
tokenizing and annotating all rows, and again with full ones, as with each λ, each resume and each rank. Fixed costs,
such as imports and the export of the model, are included, and show most at small sizes.

With `--zeros` the log-probabilities of the reference are zeros, so that a first start costs what everything else does:
the model is tiny, but a million rows have 16 million pairs in micro-batches of 8.

`results.json` has one record per command: wall-clock seconds, CPU seconds, the peak of resident memory, and the peak of
that part of it that is not a mapped file (GiB, by /proc, so Linux alone). `rows.png` shows them over the rows, both
axes logarithmic: a straight line of slope 1 is linear.
"""

import argparse
import json
import os
import random
import runpy
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from notebooks.tiny import ROOT, save_model

LOSSES = {
    "sft": ["loss=sft"],
    "var_grouped": ["loss=var_grouped"],
    "dpo": ["loss=dpo"],
    "var": ["loss=var", "reward.mismatch_gap=1.0"],
}
STEP = [
    "data=files", "reward=score", "eval=off", "trainer.accelerator=cpu", "trainer.max_steps=1", "data.micro_batch=8",
    "data.global_batch=8", "data.validation_prompts=0", "trainer.precision=32-true", "data.on_template_change=count",
]  # fmt: skip
ZEROS = "--zeros"
POLL = 0.1  # seconds between two readings of a process's memory


def write_rows(path: Path, count: int) -> Path:
    """Write rows with distinct prompts; return the file."""
    draw = random.Random(0)
    with path.open("w") as file:
        for i in range(count):
            texts = ["".join(draw.choices("abcdefgh ", k=draw.randint(25, 45))) + "z" for _ in range(2)]
            responses = [{"text": text, "score": draw.random()} for text in texts]
            file.write(json.dumps({"id": str(i), "prompt": f"Number {i} of all?", "responses": responses}) + "\n")
    return path


def measure(command: list[str], log: Path) -> dict[str, float]:
    """Run a command; return its seconds and its peaks of memory. Raise an error if it fails."""
    started, peak, own = time.perf_counter(), 0, 0
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            sizes = read_memory(process.pid)
            peak, own = max(peak, sizes["VmRSS"]), max(own, sizes["RssAnon"])
            time.sleep(POLL)
    if status:
        raise SystemExit(f"{' '.join(command)}\n{log.read_text()[-3000:]}")
    return {
        "wall": round(time.perf_counter() - started, 2), "cpu": round(usage.ru_utime + usage.ru_stime, 2),
        "resident": round(peak / 2**20, 3), "unmapped": round(own / 2**20, 3),
    }  # fmt: skip


def read_memory(pid: int) -> Counter[str]:
    """Return the KiB in /proc/<pid>/status by name; nothing for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return Counter()
    return Counter({line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")})


def train_with_zeros(words: list[str]) -> None:
    """Run train.py with a reference that computes nothing."""
    from var.models.frozen import FrozenModel

    FrozenModel.policy = property(lambda self: lambda batch: torch.zeros(len(batch.target)))  # type: ignore[assignment,method-assign]
    sys.argv = [str(ROOT / "train.py"), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


def measure_starts(folder: Path, count: int, loss: str, zeros: bool) -> list[dict[str, Any]]:
    """Return the records of a first and of a second start, for one loss and number of rows."""
    rows, work = folder / f"{count}.jsonl", folder / f"{loss}-{count}"
    if not rows.exists():
        write_rows(rows, count)
    work.mkdir(parents=True, exist_ok=True)
    records = []
    for start in ("first", "cached"):
        words = [f"data.path={rows}", f"model.path={folder / 'model'}", *STEP, *LOSSES[loss], "resume=false"]
        words += [f"{key}={work}/{key}" for key in ("cache", "annotation_cache", "runs")]
        script = [__file__, ZEROS] if zeros else [str(ROOT / "train.py")]
        numbers = measure([sys.executable, *script, *words], work / f"{start}.log")
        files = sum(path.is_file() for path in (work / "annotation_cache").rglob("*"))
        records.append({"rows": count, "loss": loss, "start": start, **numbers, "annotation files": files})
        print(json.dumps(records[-1]), flush=True)
    return records


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Draw CPU seconds and memory over the rows."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name, unit in zip(axes, ("cpu", "unmapped"), ("CPU seconds", "GiB that are not mapped"), strict=True):
        for loss in LOSSES:
            for start, style in (("first", "--"), ("cached", "-")):
                found = [record for record in records if (record["loss"], record["start"]) == (loss, start)]
                axis.plot(
                    [r["rows"] for r in found], [r[name] for r in found], style, marker="o", label=f"{loss}, {start}"
                )
        axis.set(xscale="log", yscale="log", xlabel="rows", ylabel=unit)
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure all sizes and losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where caches, logs and results are written")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument(ZEROS, action="store_true", help="let the reference compute nothing")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder / "model")
    records = []
    for count in options.rows:
        for loss in options.losses:
            records += measure_starts(folder, count, loss, options.zeros)
            (folder / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    plot(records, folder / "rows.png")


if __name__ == "__main__":
    if sys.argv[1:2] == [ZEROS]:
        train_with_zeros(sys.argv[2:])
    else:
        main()
