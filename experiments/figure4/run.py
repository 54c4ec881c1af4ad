"""Figure 4 (arXiv 2502.11026) on a real model: the variance of Ẑ(x), in-batch and sampled, against B.

    python experiments/figure4/run.py runs/figure4
    python report.py runs/figure4                    # the figure

Overrides of train.py may follow the folder. A prompt and its own response are fixed. The other B − 1 pairs of its
micro-batch are drawn from the other prompts, with replacement, as from a large data set. For the sampled estimate, B
responses are drawn from the prompt's candidates. The numbers of all pairs of prompts and responses are cached.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir

from var.annotate.reference_logps import cached_cross_logps
from var.annotate.responses import add_responses, sample_responses
from var.annotate.rewards import cross_rewards, score_candidates
from var.config.check import FOLDER
from var.config.entry import run_command
from var.data.choice import choose
from var.data.read import read
from var.data.rows import Rows
from var.data.sequences import encode
from var.sampling.base import Samples
from var.training.run import Run
from var.utils.console import say
from var.utils.statistics import estimate_mean

PROMPTS, CANDIDATES, ANSWERS, DRAWS = 32, 32, 3, 2000
SIZES = (2, 4, 8, 16, 32)
DEFAULTS = ["loss=var", "reward=near_number", f"data.source.problems={PROMPTS}", f"generate.responses={CANDIDATES}"]


def score_pairs(run: Run, rows: Rows, samples: Samples, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return log-probabilities [P, P] in nats per token and raw rewards [P, P].

    A column is the k-th response of a prompt, a row the prompt under which it is scored.
    """
    annotator = run.annotator
    answered = add_responses(rows, [[several[k]] for several in samples], annotator.chat, annotator.cache)
    chosen = choose(answered, "all")
    sequences = encode(answered, chosen, annotator.chat, 1024, "error", False, annotator.cache)
    micro = np.arange(len(sequences))[None]
    logps = cached_cross_logps(annotator, sequences, micro)[0] / sequences.length
    return logps, cross_rewards(annotator, answered, sequences, micro)[0]


def measure(logps: np.ndarray, rewards: np.ndarray, candidates: np.ndarray, seed: int) -> Iterator[dict[str, Any]]:
    """Yield a record per estimator and B, of means over prompts.

    - variance: Var(Ẑ)/Z², as in the figure. Z is the mean over all candidates.
    - relative_variance: Var(Ẑ)/E[Ẑ]².
    - log_bias_spread: the standard deviation of log(E[Ẑ]/Z) over prompts, the part of a bias that no common scale
      removes.

    Args:
        logps: [P, P] nats per token, of `score_pairs`.
        rewards: [P, P], divided by λ.
        candidates: [P, K], rewards of the candidates, divided by λ.
        seed: of the draws.
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
            yield make_record(name, size, seed, drawn.var(1), drawn.mean(1), z)
    spread = np.exp(candidates).var(1, ddof=1)
    for size in SIZES:
        yield make_record("sampled", size, seed, spread / size, z, z)


def make_record(
    name: str, size: int, seed: int, variance: np.ndarray, mean: np.ndarray, z: np.ndarray
) -> dict[str, Any]:
    """Return the record of one estimator and B, from Var(Ẑ), E[Ẑ] and Z [P]."""
    return {
        "estimator": name, "size": size, "seed": seed,
        "variance": float((variance / z**2).mean()), "relative_variance": float((variance / mean**2).mean()),
        "log_bias_spread": float(np.log(mean / z).std()),
    }  # fmt: skip


def main() -> None:
    """Score all pairs, write tables.json and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    options, overrides = parser.parse_known_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with initialize_config_dir(FOLDER, version_base="1.3"):
        run = Run.compose(compose("train", [*DEFAULTS, *overrides]), options.folder)
    run.annotator.check()
    rows, sampling = read(run.data.source, run.annotator.cache).head(PROMPTS), run.data.training_set.sampling
    samples = sample_responses(run.annotator, rows, sampling)
    raw = score_candidates(run.annotator, rows, sampling)
    kept = [i for i, several in enumerate(samples) if all(sample.text.strip() for sample in several[:ANSWERS])]
    say(f"{len(kept)} of {len(rows)} prompts. The others have an empty response among the first {ANSWERS}.")
    rows, samples, raw = rows.select(np.array(kept)), [samples[i] for i in kept], raw[kept]
    temperature = float(np.sqrt(raw.var(1, ddof=1).mean()))
    say(f"λ = {temperature:.3f}, the reward's standard deviation within a prompt")
    found, world = list[dict[str, Any]](), f"{run.cfg.model.name}, {run.cfg.data.name}"
    for k in range(ANSWERS):
        logps, rewards = score_pairs(run, rows, samples, k)
        found += [{"world": world, **record} for record in measure(logps, rewards / temperature, raw / temperature, k)]
    (options.folder / "tables.json").write_text(json.dumps({"partition": found}, indent=1, ensure_ascii=False))
    columns = ("variance", "relative_variance", "log_bias_spread")
    say("| estimator | B or K | Var(Ẑ)/Z² | Var(Ẑ)/E[Ẑ]² | spread of log E[Ẑ]/Z over prompts |")
    say("| --- | --- | --- | --- | --- |")
    for name in dict.fromkeys(record["estimator"] for record in found):
        for size in SIZES:
            same = [record for record in found if (record["estimator"], record["size"]) == (name, size)]
            cells = []
            for column in columns:
                mean, error = estimate_mean(np.array([record[column] for record in same]))
                cells.append(f"{mean:.3g} ± {error:.1g}")
            say(f"| {name} | {size} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run_command(main)
