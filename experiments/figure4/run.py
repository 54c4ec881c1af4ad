"""Figure 4 (arXiv 2502.11026) on a real model: how much Ẑ(x) varies, in-batch and sampled, against B.

`python experiments/figure4/run.py runs/figure4`, then `python report.py runs/figure4` for the figure. Overrides of
train.py may follow the folder. A prompt is fixed, and with it its own answer; the other B − 1 pairs of its micro-batch
are drawn from the other prompts, with replacement, as from a large data set, and for the sampled estimate B answers
from the prompt's candidates. The numbers of all pairs of prompts and answers go to the store and are kept.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir

from var.annotate.annotator import add_responses
from var.config.check import FOLDER
from var.config.entry import run_command
from var.data.rows import Rows, read
from var.data.sequences import choose, encode
from var.training.run import Run
from var.utils.console import say
from var.utils.statistics import estimate_mean

PROMPTS, CANDIDATES, ANSWERS, DRAWS = 32, 32, 3, 2000
SIZES = (2, 4, 8, 16, 32)
DEFAULTS = ["loss=var", "reward=near_number", f"data.source.problems={PROMPTS}", f"generate.responses={CANDIDATES}"]


def pairs(run: Run, rows: Rows, texts: list[list[tuple[str, bool]]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """[P, P] nats a token and raw rewards of the k-th answer of each prompt (column) under each prompt (row)."""
    annotator = run.annotator
    answered, _ = add_responses(rows, [[several[k]] for several in texts], annotator.cache)
    chosen = choose(answered, "all")
    sequences = encode(answered, chosen, annotator.chat, 1024, "error", False, annotator.cache)
    micro = np.arange(len(sequences))[None]
    logps = annotator.cross_logps(sequences, micro)[0] / sequences.length
    return logps, annotator.cross_rewards(answered, sequences, micro)[0]


def records(logps: np.ndarray, rewards: np.ndarray, candidates: np.ndarray, seed: int) -> Iterator[dict[str, Any]]:
    """Of each estimator and B: means over prompts. rewards and candidates [P, K] are divided by λ.

    variance: Var(Ẑ)/Z², as the figure asks, Z being the mean over all candidates. relative_variance: Var(Ẑ)/E[Ẑ]².
    log_bias_spread: of log(E[Ẑ]/Z) over prompts, the part of a bias that a common scale does not take away.
    """
    draw = np.random.default_rng(seed)
    z, n = np.exp(candidates).mean(1), len(rewards)
    for name, terms in (
        ("in-batch, token means", np.exp(logps + rewards)),
        ("in-batch, without π_ref", np.exp(rewards)),
    ):
        for size in SIZES:
            drawn = np.empty((n, DRAWS))
            for i in range(n):
                others = np.delete(terms[i], i)[draw.integers(n - 1, size=(DRAWS, size - 1))]
                drawn[i] = (terms[i, i] + others.sum(1)) / size
            yield summary(name, size, seed, drawn.var(1), drawn.mean(1), z)
    spread = np.exp(candidates).var(1, ddof=1)
    for size in SIZES:
        yield summary("sampled", size, seed, spread / size, z, z)


def summary(name: str, size: int, seed: int, variance: np.ndarray, mean: np.ndarray, z: np.ndarray) -> dict[str, Any]:
    return {
        "estimator": name, "size": size, "seed": seed,
        "variance": float((variance / z**2).mean()), "relative_variance": float((variance / mean**2).mean()),
        "log_bias_spread": float(np.log(mean / z).std()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    given, overrides = parser.parse_known_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    with initialize_config_dir(FOLDER, version_base="1.3"):
        run = Run.compose(compose("train", [*DEFAULTS, *overrides]), given.folder)
    run.annotator.check()
    rows, sampling = read(run.data.source, run.annotator.cache).head(PROMPTS), run.data.sampling
    texts = run.annotator.sampled(rows, sampling)
    raw = run.annotator.candidates(rows, sampling)
    kept = [i for i, several in enumerate(texts) if all(text.strip() for text, _ in several[:ANSWERS])]
    say(f"{len(kept)} of {len(rows)} prompts; the others have an empty answer among the first {ANSWERS}")
    rows, texts, raw = rows.select(np.array(kept)), [texts[i] for i in kept], raw[kept]
    temperature = float(np.sqrt(raw.var(1, ddof=1).mean()))
    say(f"λ = {temperature:.3f}, the reward's standard deviation within a prompt")
    found, world = list[dict[str, Any]](), f"{run.cfg.model.name}, {run.cfg.data.name}"
    for k in range(ANSWERS):
        logps, rewards = pairs(run, rows, texts, k)
        found += [{"world": world, **one} for one in records(logps, rewards / temperature, raw / temperature, k)]
    (given.folder / "tables.json").write_text(json.dumps({"partition": found}, indent=1, ensure_ascii=False))
    columns = ("variance", "relative_variance", "log_bias_spread")
    say("| estimator | B or K | Var(Ẑ)/Z² | Var(Ẑ)/E[Ẑ]² | spread of log E[Ẑ]/Z over prompts |")
    say("| --- | --- | --- | --- | --- |")
    for name in dict.fromkeys(record["estimator"] for record in found):
        for size in SIZES:
            of = [record for record in found if (record["estimator"], record["size"]) == (name, size)]
            cells = []
            for column in columns:
                mean, error = estimate_mean(np.array([record[column] for record in of]))
                cells.append(f"{mean:.3g} ± {error:.1g}")
            say(f"| {name} | {size} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run_command(main, "train")
