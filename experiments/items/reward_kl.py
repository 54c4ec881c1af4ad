"""Reward against KL: how much reward each method has when it is at most some distance from the reference."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from experiments.items.base import Column, Command, Item, Pool, Row, Table, train

WORDS = ("experiment=reward_kl",)
PAIRS = ("data.micro_batch=4", "data.global_batch=4")
GROUPS = ("data.micro_batch=2", "data.global_batch=2")  # of 4 answers, so that a step has 8, as those of other losses
RIGHT = ("loss=var_global", "loss.temperature_unit=reward", "loss.temperature=0.001", "loss.min_weight=0.5")
RATE, RATES = "model.learning_rate", (1e-5, 2e-5, 4e-5, 8e-5)
SPREADS = (0.1, 0.3, 1.0, 3.0)  # λ in standard deviations of the reward within a prompt
UNITS = (0.03, 0.1, 0.3, 1.0)  # λ in units of the reward, one standard deviation of which is about 0.3
STEPS = (0, 9, 18, 27, 36)
"""Optimizer steps after which the runs are evaluated."""
DISTANCES = (0.5, 1.0, 2.0, 4.0)
"""Nats."""
REPEATS = 1000
"""Bootstrap samples."""

# Paths through the plane of KL and reward

Path2D = tuple[np.ndarray, np.ndarray]
"""KL and reward, [S] each, from the reference on."""
Trace = Callable[[np.ndarray, np.ndarray], Path2D]
"""The path for a choice of seeds and of prompts, by index."""


def trace_training(paths: Sequence[Path]) -> tuple[Trace, tuple[int, int]]:
    """Return the path of a method along training, averaged over seeds, and the numbers of seeds and prompts."""
    kl, reward = [], []
    for path in paths:
        records = [json.loads(line) for line in (path.parent / "evaluations.jsonl").read_text().splitlines()]
        rewards = [np.mean(record["reward"], axis=1) for record in records]
        distances = [np.mean(record["kl"], axis=1) for record in records[1:]]
        reward.append(rewards)
        kl.append([np.zeros_like(rewards[0]), *distances])
    kl_of, reward_of = np.array(kl), np.array(reward)  # [seeds, S, prompts]

    def trace(seeds: np.ndarray, prompts: np.ndarray) -> Path2D:
        return kl_of[seeds][:, :, prompts].mean((0, 2)), reward_of[seeds][:, :, prompts].mean((0, 2))

    return trace, (len(paths), kl_of.shape[2])


def read_reference(path: Path) -> np.ndarray:
    """Return the rewards [prompts, K] of the reference's answers."""
    return np.array(json.loads((path.parent / "evaluations.jsonl").read_text().splitlines()[0])["reward"])


TEMPERATURES = np.geomspace(30, 0.003, 60)
"""λ on the path of the optimum, in units of the reward."""


def trace_optimum(rewards: np.ndarray) -> Trace:
    """Return the path of RLHF's optimum over λ, by self-normalized importance sampling.

    The reward is Σ w r with w ∝ exp(r/λ) over the K answers to a prompt, and the KL Σ w log(K w). It is the optimum on
    these answers, and lies below that on all answers: a method can be above it.
    """
    logits = rewards / TEMPERATURES[:, None, None]
    weights = np.exp(logits - logits.max(2, keepdims=True))
    weights /= weights.sum(2, keepdims=True)
    reward = (weights * rewards).sum(2)
    kl = np.where(weights > 0, weights * np.log(np.maximum(weights, 1e-300) * rewards.shape[1]), 0).sum(2)

    def trace(seeds: np.ndarray, prompts: np.ndarray) -> Path2D:
        first = rewards[prompts].mean()
        return np.append(0, kl[:, prompts].mean(1)), np.append(first, reward[:, prompts].mean(1))

    return trace


def trace_best_of(rewards: np.ndarray) -> Trace:
    """Return the path of the best of n answers, n = 1 … K/2: its expected reward, and the KL log n − (n − 1)/n.

    This KL is a bound from above, which ties make loose.
    """
    count = rewards.shape[1]
    ordered, n = np.sort(rewards, axis=1), np.arange(1, count // 2 + 1)
    # n draws without replacement have the i-th smallest of K as their largest with probability C(i − 1, n − 1)/C(K, n)
    chances = [[math.comb(i, int(size) - 1) / math.comb(count, int(size)) for i in range(count)] for size in n]
    reward = ordered @ np.array(chances).T
    kl = np.log(n) - (n - 1) / n

    def trace(seeds: np.ndarray, prompts: np.ndarray) -> Path2D:
        return kl, reward[prompts].mean(0)

    return trace


def make_trace(paths: Sequence[Path], row: Row) -> tuple[Trace, tuple[int, int]]:
    """Return a row's path, and the numbers of seeds and prompts over which it can be drawn again."""
    limits = {"optimum": trace_optimum, "best of n": trace_best_of}
    if (kind := row.where.get("path")) is None:
        return trace_training(paths)
    rewards = read_reference(paths[0])
    return limits[kind](rewards), (1, len(rewards))


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


def pool(value: Callable[[Path2D], float], trained: bool | None = None) -> Pool:
    """Return what computes `value` of the mean path, and its standard error by a bootstrap over seeds and prompts.

    trained: True if it is for rows that are trained, False if it is for limits, None for both. A value of NaN does not
    apply.
    """

    def compute(paths: Sequence[Path], row: Row) -> tuple[float, float] | None:
        if trained is not None and trained == ("path" in row.where):
            return None
        trace, (seeds, prompts) = make_trace(paths, row)
        found = value(trace(np.arange(seeds), np.arange(prompts)))
        if math.isnan(found):
            return None
        of_seeds, of_prompts = (np.random.default_rng([0, i]) for i in range(2))
        drawn = [
            value(trace(of_seeds.integers(seeds, size=seeds), of_prompts.integers(prompts, size=prompts)))
            for _ in range(REPEATS)
        ]
        return found, float(np.std(drawn, ddof=1))

    return compute


def within(distance: float) -> Column:
    """Return the column of the reward within a distance. A limit has none beyond its last point."""

    def compute(paths: Sequence[Path], row: Row) -> tuple[float, float] | None:
        read = read_limit if "path" in row.where else read_within
        return pool(lambda path: read(path, distance))(paths, row)

    return Column(title=f"reward within {distance:g} nats", pool=compute)


PANEL = "reward of new answers to held-out prompts"


def along(index: int, step: str, shown: bool = False, panel: str | None = PANEL) -> tuple[Column, Column]:
    """Return the columns of a training run's KL and reward at an evaluation, which a shorter run does not have."""

    def read(part: int) -> Pool:
        return pool(lambda path: float(path[part][index]) if index < len(path[part]) else math.nan, trained=True)

    kl, reward = read(0), read(1)
    return (
        Column(title=f"KL {step} (nats)", pool=kl, digits=2, shown=shown),
        Column(title=f"reward {step}", pool=reward, shown=shown, x=f"KL {step} (nats)", panel=panel),
    )


def limit(distance: float) -> Column:
    """Return the column of a limit's reward at a distance, for the figure."""
    reward = pool(lambda path: read_limit(path, distance), trained=False)
    return Column(title=f"limit at {distance:g} nats", pool=reward, shown=False, x=distance, panel=PANEL)


COLUMNS = (
    *map(within, DISTANCES),
    *(column for i, step in enumerate(STEPS[:-1]) for column in along(i, f"at step {step}")),
    *along(-1, "at the end", shown=True),
    *map(limit, (0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)),
)

# Methods

METHODS: dict[str, tuple[tuple[str, ...], str, tuple[float, ...]]] = {
    "SFT on all answers": (("loss=sft",), RATE, RATES),
    "SFT on the best of 4": (("loss=sft", "data.responses=best"), RATE, RATES),
    "SFT on right answers": (RIGHT, RATE, RATES),
    "VAR, the paper's": (("loss=var",), "loss.temperature", SPREADS),
    "VAR, prompt": (("loss=var_prompt",), "loss.temperature", SPREADS),
    "VAR, grouped": (("loss=var_grouped",), "loss.temperature", SPREADS),
    "DPO": (("loss=dpo", *PAIRS), "loss.beta", (0.03, 0.1, 0.3, 1.0)),
    "InfoNCA": (("loss=infonca", *GROUPS, "loss.beta=1"), "loss.temperature", UNITS),
    "A-LoL": (("loss=alol", "loss.value.development_prompts=32"), RATE, RATES),
    "DRO-V": (("loss=dro", "loss.initial_value=0.3"), "loss.temperature", UNITS),
    "trajectory balance, reverse KL": (("loss=trajectory_balance", *GROUPS), "loss.temperature", UNITS),
    "trajectory balance, forward KL": (
        ("loss=trajectory_balance", *GROUPS, "loss.alpha=0"), "loss.temperature", UNITS,
    ),
    "RLOO": (("loss=rloo", *GROUPS), RATE, RATES),
    "GRPO": (("loss=grpo", *GROUPS), RATE, RATES),
    "VAR, online": (("loss=var_online", *GROUPS), "loss.temperature", UNITS),
}  # fmt: skip
"""Overrides, the hyper-parameter that is tuned, and its values."""
OTHERS = ("data.source.skip=224", "data.source.problems=160")
"""Problems that the comparison does not have."""
SHORTER = (*OTHERS, "trainer.max_steps=24", "eval.every_n_steps=12")


def make_run(method: str, value: float, *words: str) -> dict[str, Command]:
    """Return the training run of a method with a value of its hyper-parameter."""
    own, key, _ = METHODS[method]
    return {"train": train(*WORDS, *own, f"{key}={value:g}", *words)}


TUNING = tuple(
    Row(
        group=method, label=f"{key.split('.')[-1]} = {value:g}",
        stages=make_run(method, value, *SHORTER),
    )
    for method, (_, key, values) in METHODS.items()
    for value in values
)  # fmt: skip
"""Each method with each value, on other problems than those of the comparison."""
TUNED: dict[str, float] = {}
"""The value of each method with the highest reward within 2 nats in the table of hyper-parameters."""
LIMITS = tuple(
    Row(
        label=label, where={"path": path}, once=True,
        stages={"train": train(*WORDS, "loss=sft", "eval.sampling.responses=64", "trainer.max_seconds=0")},
    )
    for label, path in {"optimum of RLHF, all λ": "optimum", "best of n": "best of n"}.items()
)  # fmt: skip
TUNING_TITLE = "Hyper-parameters"
ITEMS = {
    "reward_kl": Item(
        title="reward against KL",
        sizes={
            "small": (
                Table(
                    title="At equal numbers of steps",
                    rows=(
                        *LIMITS,
                        *(Row(label=method, stages=make_run(method, value)) for method, value in TUNED.items()),
                    ),
                    columns=COLUMNS, seeds=(0, 1, 2), x_label="KL from the reference (nats)",
                    errors="Errors are bootstraps over seeds and over prompts.",
                ),
                Table(
                    title=TUNING_TITLE, rows=TUNING,
                    columns=(*map(within, DISTANCES), *along(-1, "at the end", shown=True, panel=None)),
                    errors="1 seed, other problems. Errors are bootstraps over prompts.",
                ),
            ),
        },
    ),
}  # fmt: skip
