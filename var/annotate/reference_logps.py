"""Log-probabilities of the reference: of each response, of all pairings in a micro-batch, and of mismatched ones."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from var.annotate.annotator import Annotator, batch_by_tokens, count_shared
from var.annotate.base import Provider, TrainingSet
from var.annotate.cache_column import Column
from var.annotate.keys import hash_pairs, hash_sequences
from var.annotate.rewards import remember_matrix
from var.data.sequences import Sequences
from var.models.cross_scoring import mismatched_logps, pack_mismatched
from var.models.packing import Packed, pack, pack_tree
from var.requirements import MismatchedLogps, ReferenceLogps
from var.utils.errors import UserError

CROSS = "Cross log-probabilities"  # the name of the stage


class ProvideReferenceLogps(Provider[ReferenceLogps]):
    """Provides log π_ref of each response token, cached or from a live reference."""

    def compute(self, data: TrainingSet) -> None:
        """Compute them, unless the reference is live."""
        self.logps = None if data.live else reference_logps(data.annotator, data.sequences, data.shares_prompts)

    def batch_fields(self, data: TrainingSet, micro_batch: int, members: np.ndarray) -> dict[str, Any]:
        """Return them, [N] nats."""
        if self.logps is None:
            return {}
        return {"reference_logps": torch.tensor(self.logps.take(members).flatten().to_pylist())}

    def at_step(self, batch: Packed, policy: Any, reference: Any) -> Packed:
        """Compute them with a live reference."""
        return batch if reference is None else replace(batch, reference_logps=reference(batch))

    def at_rollout(self, batch: Packed, policy: Any, reference: Any) -> Packed:
        """Compute them of responses that were just sampled."""
        return replace(batch, reference_logps=reference.policy(batch))


class ProvideMismatchedLogps(Provider[MismatchedLogps]):
    """Provides log π of the next sequence's response under each prompt, of the policy and of the reference."""

    def check_plan(self, data: TrainingSet) -> None:
        """Check that each micro-batch has two sequences, and that the pairings fit the model."""
        data.check_cross_lengths()
        if (data.plan.sequences < 2).any():
            raise UserError(
                "this loss pairs each prompt with the next sequence's response, and a micro-batch has one sequence. "
                "Set data.micro_batch to 2 or more, and data.last_micro_batch=drop."
            )

    def compute(self, data: TrainingSet) -> None:
        """Compute the reference's, unless it is live."""
        self.logps = None if data.live else cached_mismatched_logps(data.annotator, data.sequences, data.members)

    def batch_fields(self, data: TrainingSet, micro_batch: int, members: np.ndarray) -> dict[str, Any]:
        """Return the pairings and, unless it is live, the reference's [B] in nats.

        These are in float64 because a small difference from the policy's is used.
        """
        ids, starts, _ = zip(*(data.sequences.tokens(i) for i in members.tolist()), strict=True)
        fields: dict[str, Any] = {"mismatched": pack_mismatched(ids, starts)}
        if self.logps is not None:
            fields["mismatched_reference_logps"] = self.logps[micro_batch, : len(members)]
        return fields

    def at_step(self, batch: Packed, policy: Any, reference: Any) -> Packed:
        """Compute the policy's, and those of a live reference."""
        if reference is not None:
            batch = replace(batch, mismatched_reference_logps=mismatched_logps(reference, batch.mismatched))
        return replace(batch, mismatched_logps=mismatched_logps(policy, batch.mismatched))


def reference_logps(annotator: Annotator, sequences: Sequences, share: bool = False) -> Column:
    """Return [n] lists of float32 nats: log π_ref of each response token.

    Args:
        annotator: has the reference.
        sequences: n sequences.
        share: whether neighbors that answer the same prompt share its tokens (`pack`), as in the training step.
    """
    reference = annotator.reference
    fingerprint = reference.fingerprint
    if share and reference.is_low_precision:
        fingerprint["packing"] = "shared prompts"
    table = annotator.annotations.table("reference_logps", fingerprint, pa.list_(pa.float32()))
    keys = hash_sequences(sequences, annotator.cache)
    part = sequences.group if share else np.arange(len(sequences))
    cost = count_shared(part, sequences.length, sequences.start)

    @torch.inference_mode()
    def compute(indices: np.ndarray, advance: Callable[[int], None]) -> list[np.ndarray]:
        found: dict[int, np.ndarray] = {}
        for batch in batch_by_tokens(indices, (sequences.start + sequences.length)[indices].tolist()):
            ids, starts, _ = zip(*(sequences.tokens(i) for i in batch), strict=True)
            packed = pack(ids, starts, share=share)
            with reference.precision():
                logps = reference.policy(packed.to(reference.device)).float().cpu()
            found.update(zip(batch, (part.numpy() for part in logps.split(packed.length.tolist())), strict=True))
            advance(len(batch))
        return [found[i] for i in indices]

    return annotator.fill(table, "Reference log-probabilities", "responses", keys, compute, part=part, cost=cost)


def sum_logps(logps: Column) -> torch.Tensor:
    """Return [n] float64 nats: sums over response tokens."""
    sums = [np.zeros(0)]
    for chunk in logps.chunks():
        flat, length = chunk.flatten().to_numpy().astype(np.float64), chunk.value_lengths().to_numpy()
        sums.append(np.add.reduceat(flat, np.cumsum(length) - length))
    return torch.from_numpy(np.concatenate(sums))


def cached_cross_logps(annotator: Annotator, sequences: Sequences, micro: np.ndarray) -> np.ndarray:
    """Return [M, B, B] nats: log π_ref(y_j|x_i) of each micro-batch, summed over tokens; 0 where it is short."""
    return remember_matrix(
        annotator, sequences, micro, CROSS, annotator.reference.fingerprint,
        lambda pairs, first: _pair_logps(annotator, sequences, pairs, first),
    )  # fmt: skip


def cached_mismatched_logps(annotator: Annotator, sequences: Sequences, micro: np.ndarray) -> torch.Tensor:
    """Return [M, W] nats: the reference's log-probability of the next response of a micro-batch under each prompt."""
    following = np.full_like(micro, -1)
    for m, members in enumerate(micro):
        members = members[members >= 0]
        following[m, : len(members)] = np.roll(members, -1)
    place = micro >= 0  # absent sequences are at the end
    logps = torch.zeros(micro.shape, dtype=torch.float64)
    pairs = np.stack([micro[place], following[place]], axis=1)
    logps[torch.from_numpy(place)] = torch.from_numpy(_pair_logps(annotator, sequences, pairs))
    return logps


def _pair_logps(annotator: Annotator, sequences: Sequences, pairs: np.ndarray, first: bool = True) -> np.ndarray:
    """Return [P] nats: log π_ref of response j under the prompt of i, summed over tokens, for pairs (i, j) [P, 2].

    first: as for `Annotator.fill`.
    """
    reference = annotator.reference
    table = annotator.annotations.table("cross_logps", reference.fingerprint, pa.float64())
    keys = hash_pairs(sequences, pairs, annotator.cache)
    owner = sequences.group[pairs[:, 0]]  # pairs with one prompt share its tokens

    def cost(indices: Any = slice(None)) -> np.ndarray:
        asked, answered = pairs[indices].T
        return count_shared(owner[indices], sequences.length[answered], sequences.start[asked])

    @torch.inference_mode()
    def compute(indices: np.ndarray, advance: Callable[[int], None]) -> list[float]:
        found: dict[int, float] = {}
        prompt, response = dict[int, list[int]](), dict[int, list[int]]()
        for i in np.unique(pairs[indices]).tolist():
            ids, start, _ = sequences.tokens(i)
            prompt[i], response[i] = ids[:start], ids[start:]
        for batch in batch_by_tokens(indices, cost(indices).tolist()):
            by_prompt: dict[int, list[int]] = {}
            for at in batch:
                by_prompt.setdefault(int(owner[at]), []).append(at)
            order = [at for several in by_prompt.values() for at in several]
            responses = [[response[j] for j in pairs[several, 1].tolist()] for several in by_prompt.values()]
            tree = pack_tree([prompt[int(pairs[several[0], 0])] for several in by_prompt.values()], responses)
            with reference.precision():
                logps = reference.policy(tree.to(reference.device)).double().cpu()
            found.update(zip(order, tree.sum_by_sequence(logps).tolist(), strict=True))
            advance(len(batch))
        return [found[i] for i in indices]

    return annotator.fill(table, CROSS, "pairs", keys, compute, part=owner, cost=cost(), first=first).to_numpy()
