"""The plan: which units form which micro-batch and optimizer step, fixed before training and for any devices."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from var.utils.console import warn
from var.utils.errors import UserError

ABSENT = -1  # fills the last, short micro-batch


class MicroBatch(NamedTuple):
    """A micro-batch of the plan, as one rank trains it."""

    number: int
    """Its row in `Plan.micro`."""
    tokens: float
    """Response tokens of its complete optimizer step."""
    sequences: float
    """Sequences of its complete optimizer step."""
    units: float
    """Units of its complete optimizer step."""
    padding: bool = False
    """Whether it only keeps the ranks in step. A padding batch counts for nothing."""

    @property
    def divisors(self) -> dict[str, Any]:
        """The fields of `Packed` with the loss's divisors."""
        return {
            "global_tokens": self.tokens, "global_sequences": self.sequences, "global_groups": self.units,
            "padding": self.padding,
        }  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Micro-batches and optimizer steps of an epoch. A unit is a sequence, a pair, or all responses to a prompt."""

    micro: np.ndarray
    """[M, B] int: the units of each micro-batch, ABSENT where the last one is short."""
    tokens: np.ndarray
    """[M] response tokens of each micro-batch."""
    sequences: np.ndarray
    """[M] sequences of each micro-batch."""
    work: np.ndarray
    """[M] tokens that the model reads in each micro-batch, by which work is balanced over ranks."""
    window: int
    """Micro-batches per optimizer step, over all ranks and accumulation. The last step may be shorter."""
    seed: int
    """The seed of the order."""
    fingerprint: str = ""
    """A hash of the units' tokens."""
    dropped: int = 0
    """Units that are in no micro-batch."""

    @property
    def hash(self) -> str:
        """A hash of the micro-batches, their content and the steps. A checkpoint resumes only with the same one."""
        digest = hashlib.sha256(f"{self.micro.shape}{self.window}{self.seed}{self.fingerprint}".encode())
        for array in (self.micro, self.tokens, self.sequences):
            digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
        return digest.hexdigest()[:16]

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch."""
        return -(-len(self.micro) // self.window)

    def epoch(self, epoch: int) -> np.ndarray:
        """Return [M] the micro-batches in the order of this epoch. Complete steps are permuted; a short one stays last.

        Steps keep their micro-batches, so runs that differ only in B see the same rows at the same step.
        """
        order = np.arange(len(self.micro))
        if epoch == 0:
            return order
        complete = int((self.micro != ABSENT).sum()) // (self.window * self.micro.shape[1])  # whatever B is
        steps = order[: complete * self.window].reshape(complete, self.window)
        shuffled = steps[np.random.default_rng([self.seed, epoch]).permutation(complete)].ravel()
        return np.concatenate([shuffled, order[complete * self.window :]])

    def batches(self, epoch: int, rank: int, world: int) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of an epoch.

        Micro-batches of a step are dealt to the ranks in serpentine order of decreasing cost, to balance load. A single
        rank gets them in the plan's order. If the last turn of a step has none for a rank (the step is short, or the
        ranks do not divide it), the rank gets the step's last micro-batch as padding, so that the ranks stay in step.
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
                padding = mine >= len(step)
                yield MicroBatch(int(step[-1 if padding else mine]), *totals, padding=padding)

    def turns(self, world: int) -> int:
        """Return the micro-batches of one rank in a complete optimizer step, padding included."""
        return -(-self.window // world)

    def length(self, world: int) -> int:
        """Return the micro-batches of one rank per epoch."""
        complete, rest = divmod(len(self.micro), self.window)
        return complete * self.turns(world) + -(-rest // world)

    def convert_progress(self, count: int, before: int, now: int, passes: int = 1) -> int:
        """Return a rank's micro-batches so far, `count` on `before` ranks, as their number on `now` ranks.

        The progress must be between two optimizer steps, if the number of ranks differs. passes: how often an epoch
        trains each micro-batch.
        """
        if before == now:
            return count
        epochs, position = divmod(count, self.length(before) * passes)
        steps = -(-position // self.turns(before))  # the last step of an epoch may be short
        return epochs * self.length(now) * passes + min(steps * self.turns(now), self.length(now) * passes)


def make_plan(
    tokens: np.ndarray,
    sequences_per_unit: int | np.ndarray,
    micro_batch: int,
    global_batch: int,
    seed: int,
    last_micro_batch: Literal["drop", "keep", "error"],
    last_step: Literal["keep", "drop"],
    fingerprint: str = "",
    work: np.ndarray | None = None,
) -> Plan:
    """Shuffle the units and split them into micro-batches of exactly B.

    B = 2, 4 and 8 with one seed are nested: a micro-batch of 8 is two of 4.

    Args:
        tokens: [units] response tokens.
        sequences_per_unit: one number, or [units].
        micro_batch: B, in units.
        global_batch: units per optimizer step.
        seed: of the order.
        last_micro_batch: what to do with a last micro-batch of fewer than B units.
        last_step: what to do with a last step of fewer than global_batch units.
        fingerprint: a hash of the units' tokens.
        work: [units] tokens that the model reads; None for the response tokens.
    """
    if global_batch % micro_batch:
        raise UserError(
            f"data.global_batch={global_batch} must be a multiple of data.micro_batch={micro_batch}: an optimizer step "
            "has complete micro-batches"
        )
    n, window = len(tokens), global_batch // micro_batch
    order = np.random.default_rng(seed).permutation(n)
    rest = n % micro_batch
    if rest and last_micro_batch == "error":
        raise UserError(
            f"data.last_micro_batch=error: {n} units do not divide into micro-batches of {micro_batch}, {rest} are "
            "left over. Set data.last_micro_batch to drop or keep."
        )
    if rest and last_micro_batch == "keep":
        order = np.concatenate([order, np.full(micro_batch - rest, ABSENT)])
    micro = order[: len(order) - len(order) % micro_batch].reshape(-1, micro_batch)
    if last_step == "drop":
        micro = micro[: len(micro) - len(micro) % window]
    if not len(micro):
        raise UserError(
            f"{n} units are too few for a complete micro-batch of {micro_batch} and step of "
            f"{global_batch}. Lower data.micro_batch and data.global_batch, or set data.last_micro_batch=keep "
            "data.last_step=keep."
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
        fingerprint=fingerprint,
        dropped=n - int(present.sum()),
    )


def draw(advantages: np.ndarray, kind: Literal["all", "uniform", "priority"], seed: int) -> np.ndarray:
    """Return the indices of the sequences to train on, by their advantages [n], as A-LoL draws them.

    Args:
        advantages: [n].
        kind: `all`; `uniform` for each of A > 0 once; `priority` for as many draws as there are of A > 0, with
            replacement, proportional to max(A, 0).
        seed: of the draws.
    """
    positive = np.flatnonzero(advantages > 0)
    if not len(positive):
        raise UserError(
            "no response's reward exceeds V(x), the reference's expected reward for its prompt, so no advantage is "
            "positive and nothing would be learned. Use another reward, other responses or another loss.value."
        )
    if kind == "all":
        return np.arange(len(advantages))
    if kind == "uniform":
        return positive
    odds = np.asarray(advantages[positive], dtype=np.float64)
    # [seed, 0, 1] is neither the stream of the plan's first order, [seed], nor that of an epoch, [seed, epoch].
    return np.random.default_rng([seed, 0, 1]).choice(positive, size=len(positive), p=odds / odds.sum())


def stack_by_group(group: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Return [G, K] the members of each group, ABSENT where a group has fewer than the largest."""
    order = np.argsort(group, kind="stable")
    _, start, count = np.unique(group[order], return_index=True, return_counts=True)
    stacked = np.full((len(count), count.max()), ABSENT)
    place = np.arange(len(order)) - np.repeat(start, count)
    stacked[np.repeat(np.arange(len(count)), count), place] = members[order]
    return stacked


def count_dropped(plan: Plan, sequences: int) -> int:
    """Return how many of these sequences are in no micro-batch, and warn if they are many."""
    dropped = sequences - int(plan.sequences.sum())
    if dropped > 0.1 * sequences:
        warn(
            f"{dropped} of {sequences} sequences do not fill the last micro-batch or step, so they do not train. Set "
            "data.last_micro_batch=keep data.last_step=keep, or a smaller data.global_batch."
        )
    return dropped
