"""Compare the time per prompt of VAR and GRPO: one epoch of each over the same prompts, in turn, by train.py.

    python experiments/benchmarks/online.py runs/online --prompts 32 --answers 4 --rounds 3

VAR trains on one cached response per prompt. Its time is reported without sampling and scoring, like the training epoch
in the paper's Table 4, and with them. GRPO samples K responses per prompt, scores them, runs the reference (β > 0) and
trains on all K. Times are those of the run's summary, without evaluation and loading. Each run has its own annotation
cache.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def time_epoch(folder: Path, prompts: int, words: list[str]) -> tuple[float, float]:
    """Return the seconds of sampling and scoring, and of training, of one epoch."""
    shutil.rmtree(folder, ignore_errors=True)
    settings = [
        f"data.source.problems={prompts}", "data.validation_prompts=0", "trainer.epochs=1",
        "generate.max_new_tokens=20", f"runs={folder}/runs", f"annotation_cache={folder}/annotations",
    ]  # fmt: skip
    command = [sys.executable, str(ROOT / "train.py"), *settings, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(done.stdout[-3000:])
    (run,) = (folder / "runs").iterdir()
    spent = json.loads((run / "summary.json").read_text())["seconds"]
    return spent["annotating"], spent["training"]


def main() -> None:
    """Time both in turn and print their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--answers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    var = ["loss=var_prompt", "loss.temperature_unit=reward", "generate.responses=1"]
    per_step = 8 // options.answers or 1
    grpo = [
        "loss=grpo", f"generate.responses={options.answers}",
        f"data.micro_batch={per_step}", f"data.global_batch={per_step}",
    ]  # fmt: skip
    alone, total = [], []
    print(f"seconds per prompt, {options.prompts} prompts, GRPO with K = {options.answers}")
    for turn in range(options.rounds):
        sampling, training = time_epoch(options.folder, options.prompts, var)
        rolling, stepping = time_epoch(options.folder, options.prompts, grpo)
        alone.append((rolling + stepping) / training)
        total.append((rolling + stepping) / (sampling + training))
        each = [t / options.prompts for t in (sampling, training, rolling, stepping)]
        print(
            f"  round {turn}: VAR {each[0]:.3f} sampling and scoring once, {each[1]:.3f} training; "
            f"GRPO {each[2]:.3f} rollouts, {each[3]:.3f} training",
            flush=True,
        )
    for name, ratios in (("its training alone", alone), ("sampling and scoring counted", total)):
        spread = f"[{min(ratios):.2f}, {max(ratios):.2f}]"
        print(f"GRPO takes {statistics.median(ratios):.2f} {spread} times as long as VAR, {name}")


if __name__ == "__main__":
    main()
