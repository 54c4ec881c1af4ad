"""Train every method on a real model for the same wall-clock time and compare expected reward and KL, for three seeds.

    python experiments/frontier/run.py runs/frontier                 # under an hour on two idle cores
    python experiments/frontier/run.py runs/frontier --table         # only the table and figure of finished runs

Each run is `python train.py experiment=frontier <method> seed=<seed>` with its own annotation cache, so that sampling
and scoring count. Only the reference's responses to the validation prompts, which are the same for all, are shared. The
budget (trainer.max_seconds, in conf/experiment/frontier.yaml) counts sampling, scoring, reference passes and steps, but
not loading and evaluation. Finished runs are not repeated.
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
    "DPO": [
        "loss=dpo",
        "data.micro_batch=4",
        "data.global_batch=4",
    ],  # pairs, so that a step has 8 sequences for every method
    "InfoNCA": ["loss=infonca", "data.micro_batch=2", "data.global_batch=2"],  # groups of 4
    "A-LoL": ["loss=alol", "loss.value.development_prompts=10"],
    "GRPO": ["loss=grpo", "data.micro_batch=2", "data.global_batch=2"],  # prompts, with 4 responses each
    "VAR, prompt, λ = 0.3 sd": ["loss=var_prompt", "loss.temperature=0.3"],
}


def name_files(method: str, seed: int) -> str:
    """Return the stem of the run's files."""
    return f"{list(METHODS).index(method)}-{seed}"


def make_command(method: str, seed: int, folder: Path) -> list[str]:
    """Return the command line of a run."""
    settings = [f"loss.estimator.seed={1000 + seed}"] if method == "VAR, sampled Z" else []
    settings += [f"seed={seed}", f"runs={folder}/runs", f"annotation_cache={folder}/cache-{name_files(method, seed)}"]
    return [sys.executable, str(ROOT / "train.py"), "experiment=frontier", *METHODS[method], *settings]


def read_summary(method: str, seed: int, folder: Path) -> dict[str, Any] | None:
    """Return the summary of a run, or None if it is not finished."""
    path = folder / f"{name_files(method, seed)}.json"
    return json.loads(path.read_text()) if path.exists() else None


def run(method: str, seed: int, folder: Path) -> None:
    """Run once with a cache that has only the validation responses. Keep the summary, the metrics and the samples."""
    stem = name_files(method, seed)
    cache = folder / f"cache-{stem}"
    shutil.rmtree(cache, ignore_errors=True)
    shutil.copytree(folder / "cache", cache)
    words = make_command(method, seed, folder)
    log = folder / "log.txt"
    with log.open("a") as out:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        out.write(f"$ {' '.join(words)}\n{done.stdout}\n")
    if done.returncode:
        sys.exit(f"{method}, seed {seed} failed:\n{done.stdout[-2000:]}\nComplete log: {log}")
    (made,) = [p for p in (folder / "runs").iterdir() if p.is_dir()]
    shutil.copy(made / "summary.json", folder / f"{stem}.json")
    shutil.copy(made / "metrics.csv", folder / f"{stem}.csv")
    shutil.copy(made / "samples.jsonl", folder / f"{stem}.samples.jsonl")
    shutil.rmtree(folder / "runs")
    shutil.rmtree(cache)


def cache_validation_responses(folder: Path) -> None:
    """Sample the reference's responses to the validation prompts once, by a run without training."""
    if not (folder / "cache").exists():
        words = [
            *make_command("SFT on the best of 4", 0, folder)[:-1],
            f"annotation_cache={folder}/filling",
            "trainer.max_seconds=0",
        ]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(folder / "runs")
        for table in list((folder / "filling" / "responses").iterdir()):  # keep those of the evaluation's seed
            if json.loads((table / "fingerprint.json").read_text())["sampling"]["seed"] != 1000003:
                shutil.rmtree(table)
        (folder / "filling").rename(folder / "cache")


def format_mean(values: list[float]) -> str:
    """Return "mean ± standard error"."""
    se = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.3f} ± {se:.3f}"


def make_table(folder: Path, seeds: list[int]) -> str:
    """Return the Markdown table of the finished runs, averaged over seeds."""
    lines = [
        "| method | reward | gain | KL, nats | steps | sequences trained | sampling and scoring, s | training, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in METHODS:
        runs = [done for seed in seeds if (done := read_summary(method, seed, folder))]
        if not runs:
            continue
        validation = [r["validation"] for r in runs]
        cells = [
            format_mean([v["reward"]["after"]["mean"] for v in validation]),
            format_mean([v["reward"]["gain"]["mean"] for v in validation]),
            format_mean([v["kl"]["mean"] for v in validation]),
            f"{statistics.mean(r['steps'] for r in runs):.0f}",
            f"{statistics.mean(r['steps'] for r in runs) * 8:.0f}",
            f"{statistics.mean(r['seconds']['annotating'] for r in runs):.0f}",
            f"{statistics.mean(r['seconds']['training'] for r in runs):.0f}",
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_figure(folder: Path, seeds: list[int], target: Path) -> None:
    """Draw reward against KL of the finished runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plot, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for method in METHODS:
        runs = [done["validation"] for seed in seeds if (done := read_summary(method, seed, folder))]
        if not runs:
            continue
        kl, reward = [r["kl"]["mean"] for r in runs], [r["reward"]["after"]["mean"] for r in runs]
        spread = [statistics.stdev(v) / math.sqrt(len(v)) if len(v) > 1 else 0.0 for v in (kl, reward)]
        axis.errorbar(
            statistics.mean(kl), statistics.mean(reward), xerr=spread[0], yerr=spread[1], marker="o", label=method
        )
        axis.axhline(runs[0]["reward"]["before"]["mean"], color="grey", linewidth=0.5)
    axis.set(xlabel="KL from the reference, nats per response", ylabel="reward on validation prompts")
    axis.legend(fontsize="x-small")
    plot.savefig(target, dpi=120)


def main() -> None:
    """Run what is not finished, then print the table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--table", action="store_true", help="only the table and the figure of finished runs")
    options = parser.parse_args()
    if not options.table:
        options.folder.mkdir(parents=True, exist_ok=True)
        cache_validation_responses(options.folder)
        for seed in options.seeds:
            for method in options.methods:
                if read_summary(method, seed, options.folder) is None:
                    run(method, seed, options.folder)
                    print(f"{method}, seed {seed}: done", flush=True)
    print(make_table(options.folder, options.seeds))
    draw_figure(options.folder, options.seeds, options.folder / "frontier.png")


if __name__ == "__main__":
    main()
