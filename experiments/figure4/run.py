"""Figure 4 (arXiv 2502.11026) on a real model: the variance of Ẑ(x), in-batch and sampled, against B.

    python experiments/figure4/run.py <folder> reward=near_number data.source.problems=32 generate.responses=32
    python experiments/figure4/run.py <folder> experiment=figure4

Overrides of train.py follow the folder. A prompt and its own response are fixed: the data's response, or each of the
first three sampled ones if the data has none. The other B − 1 pairs of its micro-batch are drawn from the other
prompts, with replacement, as from a large data set. For the sampled estimate, B responses are drawn from the
generate.responses candidates of the prompt. The rewards and log-probabilities of all pairs are kept in the annotation
cache, so an interrupted measurement continues.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
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
from var.data.split import draw
from var.sampling.base import Samples
from var.training.run import Run
from var.utils.console import say
from var.utils.statistics import estimate_mean

ANSWERS, DRAWS = 3, 2000
SIZES = (2, 4, 8, 16, 32)


def list_answers(run: Run, rows: Rows, samples: Samples) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (prompts [P], log-probabilities [P, P] in nats per token, raw rewards [P, P]) for each set of responses.

    A column is the response of a prompt, a row the prompt under which it is scored. A set has one response of each
    prompt that fits data.max_length.
    """
    annotator, settings, kept = run.annotator, run.data.settings, np.arange(len(rows))
    if (rows.facts["responses"] > 0).all():
        several = [rows]
    else:
        answered = [all(sample.text.strip() for sample in drawn[:ANSWERS]) for drawn in samples]
        kept = np.flatnonzero(answered)
        say(f"{len(kept)} of {len(rows)} prompts. The others have an empty response among the first {ANSWERS}.")
        rows, samples = rows.select(kept), [samples[i] for i in kept]
        several = [
            add_responses(rows, [[drawn[k]] for drawn in samples], annotator.chat, annotator.cache)
            for k in range(ANSWERS)
        ]
    for each in several:
        choice = choose(each, "all")
        first = np.unique(choice.row, return_index=True)[1]
        choice = replace(choice, row=choice.row[first], response=choice.response[first])
        sequences = encode(each, choice, annotator.chat, settings.max_length, "drop", False, annotator.cache)
        if sequences.counts:
            say(f"Left out: {dict(sequences.counts)}")
        micro = np.arange(len(sequences))[None]
        logps = cached_cross_logps(annotator, sequences, micro)[0] / sequences.length
        yield kept[sequences.row], logps, cross_rewards(annotator, each, sequences, micro)[0]


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
        run = Run.compose(compose("train", ["loss=var", *overrides]), options.folder, trains=False, own_folder=False)
    run.annotator.check()
    sampling = run.data.training_set.sampling
    rows = draw(read(run.data.source, run.annotator.cache), run.data.settings)
    samples = sample_responses(run.annotator, rows, sampling)
    raw = score_candidates(run.annotator, rows, sampling)
    loss = run.cfg.loss
    unit = 1.0 if loss.temperature_unit == "reward" else float(np.sqrt(raw.var(1, ddof=1).mean()))
    temperature = loss.temperature * unit
    say(f"λ = {temperature:.3f}" + ("" if unit == 1.0 else ", in units of the standard deviation within a prompt"))
    found, world = list[dict[str, Any]](), f"{run.cfg.model.name}, {run.cfg.data.name}"
    for k, (prompts, logps, rewards) in enumerate(list_answers(run, rows, samples)):
        candidates = raw[prompts] / temperature
        found += [{"world": world, **record} for record in measure(logps, rewards / temperature, candidates, k)]
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
