"""Paths of KL and reward: how they are read from runs, and the columns that are computed from them."""

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.items.base import Column, Pool, Row
from var.rewards.programmatic import ExactNumber

REPEATS = 1000
"""Bootstrap samples."""
TEMPERATURES = np.geomspace(30, 0.003, 60)
"""λ on the path of the optimum, in units of the reward."""
Path2D = tuple[np.ndarray, np.ndarray]
"""KL and reward, [S] each."""


@dataclass(frozen=True)
class Paths:
    """KL from the reference and reward at S points, of each seed and prompt."""

    kl: np.ndarray
    """[seeds, S, prompts] nats."""
    reward: np.ndarray
    """[seeds, S, prompts] in reward units."""

    def mean(self, seeds: np.ndarray, prompts: np.ndarray) -> Path2D:
        """Return the mean path over a choice of seeds and of prompts, by index."""
        kl, reward = (part[seeds][:, :, prompts].mean((0, 2)) for part in (self.kl, self.reward))
        return kl, reward


Reader = Callable[..., Paths]
"""Read the paths of a row from the result files of its seeds, the row, and what else a `Pool` receives."""


def read_evaluations(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the steps [S] of a run's evaluations, and KL and reward [S, prompts], starting at the reference."""
    records = [json.loads(line) for line in (path.parent / "evaluations.jsonl").read_text().splitlines()]
    reward = np.array([np.mean(record["reward"], axis=1) for record in records])
    kl = np.array([np.zeros_like(reward[0]), *(np.mean(record["kl"], axis=1) for record in records[1:])])
    return np.array([record["step"] for record in records]), kl, reward


def read_training(paths: Sequence[Path], row: Row) -> Paths:
    """Return the paths along training."""
    _, kl, reward = zip(*map(read_evaluations, paths), strict=True)
    return Paths(np.array(kl), np.array(reward))


def read_seconds(paths: Sequence[Path]) -> dict[int, float]:
    """Return the seconds of sampling, scoring and training until the end of each logged step, in the fastest run.

    The machine's speed varies between runs, and what slows a run down is not the method.
    """
    spent = []
    for path in paths:
        with (path.parent / "metrics.csv").open(newline="") as file:
            logged = [(int(row["step"]), row["throughput/seconds"]) for row in csv.DictReader(file)]
            spent.append({0: 0.0, **{step: float(seconds) for step, seconds in logged if seconds}})
    return {step: min(run[step] for run in spent) for step in spent[0]}


def read_times(seconds: Sequence[float]) -> Reader:
    """Return a function that reads the paths at these times, on the line between two evaluations.

    Runs with the same numbers of steps and no evaluations, `clocks`, have the times of the steps, for all seeds. The
    line starts at the reference at 0 seconds, and has no values after the last evaluation.
    """

    def read(paths: Sequence[Path], row: Row, clocks: Sequence[Path]) -> Paths:
        spent, found = read_seconds(clocks), []
        for path in paths:
            steps, kl, reward = read_evaluations(path)
            times = [spent[step] for step in steps]
            found.append(
                [[np.interp(seconds, times, prompt, right=np.nan) for prompt in part.T] for part in (kl, reward)]
            )
        kl, reward = np.array(found).transpose(1, 0, 3, 2)
        return Paths(kl, reward)

    return read


def read_right(paths: Sequence[Path], row: Row) -> Paths:
    """Return the fraction of right answers before and after training, whatever the reward was."""
    reward = ExactNumber()

    def grade(record: dict, when: str) -> float:
        texts = record[when]["texts"]
        return float(np.mean(reward([record["prompt"]] * len(texts), texts, [record["answer"]] * len(texts))))

    found = []
    for path in paths:
        records = [json.loads(line) for line in (path.parent / "samples.jsonl").read_text().split("\n") if line]
        found.append([[grade(record, when) for record in records] for when in ("before", "after")])
    return Paths(np.zeros_like(found), np.array(found))


def trace_optimum(rewards: np.ndarray) -> Paths:
    """Return the path of RLHF's optimum over λ, by self-normalized importance sampling, from rewards [prompts, K].

    The reward is Σ w r with w ∝ exp(r/λ) over the K answers to a prompt, and the KL Σ w log(K w). It is the optimum on
    these answers, and lies below that on all answers: a method can be above it.
    """
    logits = rewards / TEMPERATURES[:, None, None]
    weights = np.exp(logits - logits.max(2, keepdims=True))
    weights /= weights.sum(2, keepdims=True)
    kl = np.where(weights > 0, weights * np.log(np.maximum(weights, 1e-300) * rewards.shape[1]), 0).sum(2)
    first = rewards.mean(1)
    return Paths(np.array([[0 * first, *kl]]), np.array([[first, *(weights * rewards).sum(2)]]))


def trace_best_of(rewards: np.ndarray) -> Paths:
    """Return the path of the best of n answers, n = 1 … K/2, from rewards [prompts, K].

    It has their expected reward and the KL log n − (n − 1)/n, a bound from above, which ties make loose.
    """
    count = rewards.shape[1]
    ordered, n = np.sort(rewards, axis=1), np.arange(1, count // 2 + 1)
    # n draws without replacement have the i-th smallest of K as their largest with probability C(i − 1, n − 1)/C(K, n)
    chances = [[math.comb(i, int(size) - 1) / math.comb(count, int(size)) for i in range(count)] for size in n]
    reward = np.array(chances) @ ordered.T
    kl = np.log(n) - (n - 1) / n
    return Paths(np.broadcast_to(kl[:, None], reward.shape)[None], reward[None])


LIMITS = {"optimum": trace_optimum, "best of n": trace_best_of}


def read_paths(paths: Sequence[Path], row: Row) -> Paths:
    """Return a row's paths: along training, or of the limit that the row names."""
    if (kind := row.where.get("path")) is None:
        return read_training(paths, row)
    first = json.loads((paths[0].parent / "evaluations.jsonl").read_text().splitlines()[0])
    return LIMITS[kind](np.array(first["reward"]))


def read_within(path: Path2D, distance: float) -> float:
    """Return the reward where the path is within a distance of the reference for the last time.

    This is its end, if the end is within, else the point at which it leaves for good, on the line between two of its
    points. So it is the reward of a run that is stopped there, and no point is chosen for its reward.
    """
    kl, reward = path
    if kl[-1] <= distance:
        return float(reward[-1])
    last = int(np.flatnonzero(kl <= distance)[-1])
    part = (distance - kl[last]) / (kl[last + 1] - kl[last])
    return float(reward[last] + part * (reward[last + 1] - reward[last]))


def read_limit(path: Path2D, distance: float) -> float:
    """Return a limit's reward at a distance, and NaN beyond its last point."""
    return read_within(path, distance) if distance <= path[0][-1] else math.nan


def pool(value: Callable[[Path2D], float], trained: bool | None = None, read: Reader = read_paths) -> Pool:
    """Return a function that computes `value` of the mean path, and its error by a bootstrap over seeds and prompts.

    trained: True if it is for rows that are trained, False if it is for limits, None for both. A value of NaN does not
    apply.
    """

    def compute(paths: Sequence[Path], row: Row, *others: Path) -> tuple[float, float] | None:
        if trained is not None and trained == ("path" in row.where):
            return None
        found = read(paths, row, *others)
        seeds, _, prompts = found.kl.shape
        mean = value(found.mean(np.arange(seeds), np.arange(prompts)))
        if math.isnan(mean):
            return None
        of_seeds, of_prompts = (np.random.default_rng([0, i]) for i in range(2))
        drawn = [
            value(found.mean(of_seeds.integers(seeds, size=seeds), of_prompts.integers(prompts, size=prompts)))
            for _ in range(REPEATS)
        ]
        if np.isnan(drawn).any():  # a limit that ends at about this distance
            return None
        return mean, float(np.std(drawn, ddof=1))

    return compute


# Columns

PANEL = "reward of new answers to held-out prompts"
DISTANCES = (0.5, 1.0, 2.0, 4.0)
"""Nats."""


def within(distance: float) -> Column:
    """Return the column of the reward within a distance. A limit has none beyond its last point."""

    def compute(paths: Sequence[Path], row: Row) -> tuple[float, float | None] | None:
        read = read_limit if "path" in row.where else read_within
        return pool(lambda path: read(path, distance))(paths, row)

    return Column(title=f"reward within {distance:g} nats", pool=compute)


def along(
    index: int, step: str, shown: bool = False, panel: str | None = PANEL, read: Reader = read_paths
) -> tuple[Column, Column]:
    """Return the columns of the KL and the reward at a point of a trained row's path, which a shorter path lacks."""

    def take(part: int) -> Pool:
        return pool(lambda path: float(path[part][index]) if index < len(path[part]) else math.nan, True, read)

    kl, reward = take(0), take(1)
    return (
        Column(title=f"KL {step} (nats)", pool=kl, digits=2, shown=shown),
        Column(title=f"reward {step}", pool=reward, shown=shown, x=f"KL {step} (nats)", panel=panel),
    )


def limit(distance: float) -> Column:
    """Return the column of a limit's reward at a distance, for the figure."""
    reward = pool(lambda path: read_limit(path, distance), trained=False)
    return Column(title=f"limit at {distance:g} nats", pool=reward, shown=False, x=distance, panel=PANEL)


END = along(-1, "at the end", shown=True, panel=None)
RIGHT_ANSWERS = Column(
    title="right answers at the end", pool=pool(lambda path: float(path[1][-1]), trained=True, read=read_right)
)
