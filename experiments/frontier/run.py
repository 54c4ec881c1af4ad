"""The frontier on a real model: expected reward against KL, every method at the same wall clock, three seeds.

    python experiments/frontier/run.py runs/frontier                 # under an hour on two quiet cores
    python experiments/frontier/run.py runs/frontier --table         # table and figure of what is there

Each run is `python train.py experiment=frontier <method> seed=<seed>` with a store of its own, so that sampling and
scoring count; only the reference's answers to the held-out prompts, the same for all, are shared. The budget
(trainer.max_seconds, in conf/experiment/frontier.yaml) counts sampling, scoring, reference passes and steps, no loading
and no evaluation. Runs that are done are not run again.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
METHODS = {
    "SFT on the best of 4": ["loss=sft", "data.responses=best"],
    "VAR, in-batch (the paper's)": ["loss=var"],
    "VAR, prompt": ["loss=var_prompt"],
    "VAR, grouped": ["loss=var_grouped"],
    "VAR, sampled Z": ["loss=var_sampled", "generate.responses=2", "loss.estimator.candidates=4"],
    "DPO": ["loss=dpo", "data.micro_batch=4", "data.global_batch=4"],  # pairs: 8 sequences a step, as the others
    "InfoNCA": ["loss=infonca", "data.micro_batch=2", "data.global_batch=2"],  # groups of 4
    "A-LoL": ["loss=alol", "loss.value.development_prompts=10"],
    "GRPO": ["loss=grpo", "data.micro_batch=2", "data.global_batch=2"],  # prompts, 4 answers each
    "VAR, prompt, λ = 0.3 sd": ["loss=var_prompt", "loss.temperature=0.3"],
}


def command(method: str, seed: int, folder: Path) -> list[str]:
    settings = [f"loss.estimator.seed={1000 + seed}"] if method == "VAR, sampled Z" else []
    settings += [
        f"seed={seed}",
        f"runs={folder}/runs",
        f"annotation_cache={folder}/store-{seed}-{list(METHODS).index(method)}",
    ]
    return [sys.executable, str(ROOT / "train.py"), "experiment=frontier", *METHODS[method], *settings]


def summary(method: str, seed: int, folder: Path) -> dict[str, Any] | None:
    place = folder / f"{list(METHODS).index(method)}-{seed}.json"
    return json.loads(place.read_text()) if place.exists() else None


def run(method: str, seed: int, folder: Path) -> None:
    """One run in a fresh store that holds the held-out answers alone; keeps its summary and drops the rest."""
    store = folder / f"store-{seed}-{list(METHODS).index(method)}"
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(folder / "store", store)
    words = command(method, seed, folder)
    log = folder / "log.txt"
    with log.open("a") as out:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        out.write(f"$ {' '.join(words)}\n{done.stdout}\n")
    if done.returncode:
        sys.exit(f"{method}, seed {seed} failed:\n{done.stdout[-2000:]}\nThe whole log: {log}")
    (made,) = [p for p in (folder / "runs").iterdir() if p.is_dir()]
    text = (made / "summary.json").read_text()
    (folder / f"{list(METHODS).index(method)}-{seed}.json").write_text(text)
    shutil.copy(made / "metrics.csv", folder / f"{list(METHODS).index(method)}-{seed}.csv")
    shutil.copy(made / "samples.jsonl", folder / f"{list(METHODS).index(method)}-{seed}.samples.jsonl")
    shutil.rmtree(folder / "runs")
    shutil.rmtree(store)


def held_out_answers(folder: Path) -> None:
    """Sampled and kept once, by a run of no training."""
    if not (folder / "store").exists():
        words = [
            *command("SFT on the best of 4", 0, folder)[:-1],
            f"annotation_cache={folder}/filling",
            "trainer.max_seconds=0",
        ]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(folder / "runs")
        for shelf in list((folder / "filling" / "responses").iterdir()):  # only those of the evaluation's seed stay
            if json.loads((shelf / "identity.json").read_text())["sampling"]["seed"] != 1000003:
                shutil.rmtree(shelf)
        (folder / "filling").rename(folder / "store")


def mean(values: list[float]) -> str:
    se = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.3f} ± {se:.3f}"


def table(folder: Path, seeds: list[int]) -> str:
    lines = [
        "| method | reward | gain | KL, nats | steps | sequences trained | sampling and scoring, s | training, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in METHODS:
        runs = [done for seed in seeds if (done := summary(method, seed, folder))]
        if not runs:
            continue
        validation = [r["validation"] for r in runs]
        cells = [
            mean([v["reward"]["after"]["mean"] for v in validation]),
            mean([v["reward"]["gain"]["mean"] for v in validation]),
            mean([v["kl"]["mean"] for v in validation]),
            f"{statistics.mean(r['steps'] for r in runs):.0f}",
            f"{statistics.mean(r['steps'] for r in runs) * 8:.0f}",
            f"{statistics.mean(r['seconds']['annotating'] for r in runs):.0f}",
            f"{statistics.mean(r['seconds']['training'] for r in runs):.0f}",
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(folder: Path, seeds: list[int], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plot, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for method in METHODS:
        runs = [done["validation"] for seed in seeds if (done := summary(method, seed, folder))]
        if not runs:
            continue
        kl, reward = [r["kl"]["mean"] for r in runs], [r["reward"]["after"]["mean"] for r in runs]
        spread = [statistics.stdev(v) / math.sqrt(len(v)) if len(v) > 1 else 0.0 for v in (kl, reward)]
        axis.errorbar(
            statistics.mean(kl), statistics.mean(reward), xerr=spread[0], yerr=spread[1], marker="o", label=method
        )
        axis.axhline(runs[0]["reward"]["before"]["mean"], color="grey", linewidth=0.5)
    axis.set(xlabel="KL to the reference, nats an answer", ylabel="reward of held-out answers")
    axis.legend(fontsize="x-small")
    plot.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--table", action="store_true", help="only the table and the figure of what is there")
    options = parser.parse_args()
    if not options.table:
        options.folder.mkdir(parents=True, exist_ok=True)
        held_out_answers(options.folder)
        for seed in options.seeds:
            for method in options.methods:
                if summary(method, seed, options.folder) is None:
                    run(method, seed, options.folder)
                    print(f"{method}, seed {seed}: done", flush=True)
    print(table(options.folder, options.seeds))
    figure(options.folder, options.seeds, options.folder / "frontier.png")


if __name__ == "__main__":
    main()
