"""The plan: which units make which micro-batch and optimiser step, fixed before training, whatever the devices."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from var.utils.errors import UserError

ABSENT = -1  # fills the last, short micro-batch


class Share(NamedTuple):
    """A micro-batch, and the response tokens, sequences and units of its whole optimiser step."""

    micro_batch: int
    tokens: float
    sequences: float
    units: float


@dataclass(frozen=True)
class Plan:
    """micro: [M, B] units of each micro-batch: a sequence, or what the loss compares, a pair or all of a prompt's.

    tokens, sequences: [M] response tokens and sequences of each micro-batch. work: [M] tokens that the model reads in
    it; ranks that work side by side get micro-batches of like work.
    content: a hash of the units' tokens.
    window: micro-batches of one optimiser step over all ranks and accumulation; the last one may be shorter.
    """

    micro: np.ndarray
    tokens: np.ndarray
    sequences: np.ndarray
    work: np.ndarray
    window: int
    seed: int
    content: str = ""
    dropped: int = 0

    @property
    def hash(self) -> str:
        """Of the micro-batches, their content and the window; a checkpoint holds it, another data set is refused."""
        digest = hashlib.sha256(f"{self.micro.shape}{self.window}{self.seed}{self.content}".encode())
        for array in (self.micro, self.tokens, self.sequences):
            digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
        return digest.hexdigest()[:16]

    @property
    def steps(self) -> int:
        """Optimiser steps of an epoch."""
        return -(-len(self.micro) // self.window)

    def epoch(self, epoch: int) -> np.ndarray:
        """[M] the micro-batches in the order of this epoch: whole optimiser steps are permuted, a short one stays last.

        Steps keep their micro-batches, so that runs which differ only in B see the same rows at the same step.
        """
        order = np.arange(len(self.micro))
        if epoch == 0:
            return order
        whole = int((self.micro != ABSENT).sum()) // (self.window * self.micro.shape[1])  # full steps, whatever B is
        steps = order[: whole * self.window].reshape(whole, self.window)
        shuffled = steps[np.random.default_rng([self.seed, epoch]).permutation(whole)].ravel()
        return np.concatenate([shuffled, order[whole * self.window :]])

    def batches(self, epoch: int, rank: int, world: int) -> Iterator[Share]:
        """This rank's micro-batches of an epoch.

        Of a step the dearest go to the ranks first, then the next ones, the other way round: so none waits long for
        another, within a step and over it. One rank has them in the plan's order.

        Where a short step leaves a rank without one, it gets the step's last micro-batch again with infinite
        divisors: it counts for nothing, and the ranks stay in step.
        """
        order = self.epoch(epoch)
        for begin in range(0, len(order), self.window):
            step = order[begin : begin + self.window]
            units = float((self.micro[step] != ABSENT).sum())
            totals = (float(self.tokens[step].sum()), float(self.sequences[step].sum()), units)
            if world > 1:
                step = step[np.argsort(-self.work[step], kind="stable")]
            for turn, at in enumerate(range(0, len(step), world)):
                mine = at + (world - 1 - rank if turn % 2 else rank)
                if mine < len(step):
                    yield Share(int(step[mine]), *totals)
                else:
                    yield Share(int(step[-1]), *[float("inf")] * 3)

    def length(self, world: int) -> int:
        """Micro-batches of one rank in an epoch."""
        whole, rest = divmod(len(self.micro), self.window)
        return whole * (self.window // world) + -(-rest // world)


def make_plan(
    tokens: np.ndarray,
    sequences_per_unit: int | np.ndarray,
    micro_batch: int,
    global_batch: int,
    seed: int,
    last_micro_batch: Literal["drop", "keep", "error"],
    last_step: Literal["keep", "drop"],
    content: str = "",
    work: np.ndarray | None = None,
) -> Plan:
    """Shuffle the units, split them into micro-batches of exactly B.

    tokens: [units] response tokens of each. sequences_per_unit: one number, or [units]. work: [units] tokens that the
    model reads; None: the response tokens.

    B = 2, 4, 8 of one seed nest: a micro-batch of 8 is two of 4.
    """
    if global_batch % micro_batch:
        raise UserError(
            f"data.global_batch={global_batch} is no multiple of data.micro_batch={micro_batch}; "
            "an optimiser step is a whole number of micro-batches"
        )
    n, window = len(tokens), global_batch // micro_batch
    order = np.random.default_rng(seed).permutation(n)
    rest = n % micro_batch
    if rest and last_micro_batch == "error":
        raise UserError(
            f"{n} units do not divide into micro-batches of {micro_batch} ({rest} are left over); "
            "set data.last_micro_batch to drop or keep"
        )
    if rest and last_micro_batch == "keep":
        order = np.concatenate([order, np.full(micro_batch - rest, ABSENT)])
    micro = order[: len(order) - len(order) % micro_batch].reshape(-1, micro_batch)
    if last_step == "drop":
        micro = micro[: len(micro) - len(micro) % window]
    if not len(micro):
        raise UserError(
            f"{n} units make no whole micro-batch of {micro_batch} and step of {global_batch}; lower "
            "data.micro_batch and data.global_batch, or set data.last_micro_batch=keep data.last_step=keep"
        )
    present = micro != ABSENT
    sizes = np.broadcast_to(sequences_per_unit, n)
    return Plan(
        micro=micro,
        tokens=np.where(present, np.asarray(tokens)[micro], 0).sum(1),
        sequences=np.where(present, sizes[micro], 0).sum(1),
        work=np.where(present, np.asarray(tokens if work is None else work)[micro], 0).sum(1),
        window=window,
        seed=seed,
        content=content,
        dropped=n - int(present.sum()),
    )


def draw(advantages: np.ndarray, kind: Literal["all", "uniform", "priority"], seed: int) -> np.ndarray:
    """Indices of the rows that train, by their advantages [n], as A-LoL draws them; the plan orders them after.

    all: every row. uniform: those of A > 0, once each. priority: as many draws as there are rows of A > 0, with
    replacement, ∝ max(A, 0).
    """
    positive = np.flatnonzero(advantages > 0)
    if not len(positive):
        raise UserError(
            "no response's reward is above V(x), the reference's expected reward at its prompt: no advantage is "
            "positive, and nothing would be learnt; use another reward, responses or loss.value"
        )
    if kind == "all":
        return np.arange(len(advantages))
    if kind == "uniform":
        return positive
    odds = np.asarray(advantages[positive], dtype=np.float64)
    # [seed, 0, 1]: neither the stream of the plan's first order, [seed], nor that of an epoch, [seed, epoch]
    return np.random.default_rng([seed, 0, 1]).choice(positive, size=len(positive), p=odds / odds.sum())
