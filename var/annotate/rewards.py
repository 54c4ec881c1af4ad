"""Rewards: of each response to its own prompt, of all pairings in a micro-batch, and of sampled candidates."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from var.annotate.annotator import BLOCK, Annotator, MissingAnnotations
from var.annotate.base import Provider, TrainingSet
from var.annotate.keys import hash_texts
from var.annotate.responses import sample_responses
from var.data.rows import Rows
from var.data.sequences import Sequences
from var.data.stored import read_finished, remember
from var.requirements import Rewards
from var.rewards.base import Triple, Triples, check_answers, check_scores, check_texts, compute_scores
from var.sampling.base import Samples, Sampling
from var.utils.console import say, warn
from var.utils.errors import Problems, UserError
from var.utils.provenance import hash_content
from var.weights.groups import within_prompt_std, zero_variance

KEPT = 2**20  # pairs from which on their numbers are kept in a file


class ProvideRewards(Provider[Rewards]):
    """Provides the reward of each response to its own prompt, on the run's scale."""

    def check_rows(self, data: TrainingSet, rows: Rows) -> None:
        """Check that rows have the answers that the reward compares with, and the responses whose scores it reads."""
        reward, sampled = data.annotator.reward, data.settings.responses == "sampled"
        check_answers(reward, rows)
        if not reward.scores_text and (sampled or not rows.facts["responses"].any()):
            raise UserError(
                "reward=score reads the data's own scores, and the responses that train are sampled, without scores. "
                "Choose a reward that scores text, or train the data's own responses."
            )

    def select(self, data: TrainingSet) -> None:
        """Score all sequences and fit the scale."""
        sequences, reward = data.sequences, data.annotator.reward
        if reward.scores_text:
            if scores := int(np.isfinite(sequences.column("score")).sum()):
                say(
                    f"{scores} of {len(sequences)} responses have a score in the data, which this reward does not use. "
                    "reward=score does."
                )
            raw = score(data.annotator, Triples(data.rows, sequences.row, sequences.row, sequences.response))
        else:
            raw = sequences.column("score")
            check_scores(sequences.tokens(i)[2] for i in np.flatnonzero(np.isnan(raw)).tolist())
        with np.errstate(over="ignore"):
            if not np.isfinite(raw.std()):
                raise UserError(f"the rewards, up to {np.abs(raw).max():.3g}, are too large: their spread overflows")
        data.scale = data.scale.fit(raw)
        scaled = np.array(data.scale(raw))
        negative = np.flatnonzero(scaled < 0)
        if self.requirement.nonnegative and len(negative):
            lowest = int(scaled.argmin())
            raise UserError(
                f"this loss uses rewards as weights, and {len(negative)} of {len(scaled)} are negative, the lowest "
                f"{scaled[lowest]:.4g} in row {sequences.tokens(lowest)[2]}. Set reward_scale=sigmoid."
            )
        data.rewards = torch.from_numpy(scaled)
        if data.unit == "pair":
            equal = int((scaled[0::2] == scaled[1::2]).sum())
            data.report.pairs_with_equal_rewards = equal or None
            if equal > 0.1 * len(scaled) / 2:
                warn(f"{equal} of {len(scaled) // 2} pairs have equal rewards, so neither response is better.")
        group = torch.from_numpy(sequences.group)
        data.report.reward = {
            "mean": float(raw.mean()), "sd": float(raw.std()), "scale": data.scale.describe(),
            "within_prompt_sd": within_prompt_std(data.rewards, group),
        }  # fmt: skip
        if len(sequences.first) < len(sequences):
            data.report.groups = len(sequences.first)
            data.report.zero_variance_groups = int(zero_variance(data.rewards, group)[sequences.first].sum())

    def batch_fields(self, data: TrainingSet, micro_batch: int, members: np.ndarray) -> dict[str, Any]:
        """Return the rewards [B]."""
        return {"rewards": data.require_rewards(self.requirement)[members].float()}


def score(annotator: Annotator, triples: Sequence[Triple], title: str = "Scoring", first: bool = True) -> np.ndarray:
    """Return [n] raw rewards of (prompt, response, answer) in any pairing. first: as for `Annotator.fill`."""
    table = annotator.annotations.table("rewards", {"reward": annotator.reward.fingerprint}, pa.float64())
    keys, cost = hash_texts(triples, annotator.cache)
    if annotator.annotate == "fill" and not annotator.dry:
        check_texts(annotator.reward, (triples[i] for i in np.flatnonzero(table.missing(keys)).tolist()))

    def compute(indices: np.ndarray, advance: Callable[[int], None]) -> list[float]:
        rewards: list[float] = []
        for begin in range(0, len(indices), 64):
            prompts, texts, answers = zip(*(triples[i] for i in indices[begin : begin + 64]), strict=True)
            rewards.extend(compute_scores(annotator.reward, prompts, texts, answers).tolist())
            advance(len(texts))
        problems = Problems("rewards that are not finite")
        for i, reward in zip(indices, rewards, strict=True):
            if not np.isfinite(reward):
                problems.add(f"response {triples[i][1][:60]!r}", "the reward is NaN or infinite")
        problems.check()
        return rewards

    return annotator.fill(table, title, "responses", keys, compute, cost=cost, first=first).to_numpy()


def score_rows(annotator: Annotator, rows: Rows) -> np.ndarray:
    """Return [N] raw rewards of all responses, row by row."""
    index, response = rows.list_responses()
    if not annotator.reward.scores_text:
        scores = rows.numbers("score")
        check_scores(rows[i].id for i in np.unique(index[np.isnan(scores)]).tolist())
        return scores
    return score(annotator, Triples(rows, index, index, response))


def score_candidates(annotator: Annotator, rows: Rows, sampling: Sampling) -> np.ndarray:
    """Return [R, K] raw rewards of K sampled responses to each row's prompt, empty responses included."""
    if not annotator.reward.scores_text:
        raise UserError(
            "reward=score reads only the data's own scores, and this loss rewards responses that the reference "
            "samples. Choose a reward that scores text."
        )
    samples = sample_responses(annotator, rows, sampling, "Sampling candidates")
    triples = SampledTriples(rows, samples, sampling.responses)
    return score(annotator, triples, "Scoring candidates").reshape(len(rows), sampling.responses)


class SampledTriples(Sequence[Triple]):
    """Sampled texts to score, read prompt by prompt on access."""

    def __init__(self, rows: Rows, samples: Samples, responses: int) -> None:
        self.rows, self.samples, self.responses = rows, samples, responses

    def __len__(self) -> int:
        return len(self.rows) * self.responses

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place, k = divmod(int(index), self.responses)
        row = self.rows[place]
        return row.prompt, self.samples[place][k].text, row.answer


def cross_rewards(annotator: Annotator, rows: Rows, sequences: Sequences, micro: np.ndarray) -> np.ndarray:
    """Return [M, B, B] raw rewards r(x_i, y_j) of each micro-batch; 0 where it is short."""
    gap: Any = getattr(annotator.reward, "mismatch_gap", None)
    if not annotator.reward.scores_text and gap is None:
        raise UserError(
            "reward=score has only the rewards of responses to their own prompts, and an in-batch estimator needs "
            "every response of a micro-batch under every prompt of it. Choose a reward that scores text, or "
            "loss=var_prompt, which needs no other rewards, or set reward.mismatch_gap to the reward that a "
            "response loses under another prompt."
        )
    row, own = sequences.row, sequences.column("score")

    def values(pairs: np.ndarray, first: bool) -> np.ndarray:
        prompt, response = pairs.T
        if annotator.reward.scores_text:
            triples = Triples(rows, row[prompt], row[response], sequences.response[response])
            return score(annotator, triples, "Cross scoring", first)
        same = sequences.group[prompt] == sequences.group[response]
        return own[response] - np.where(same, 0.0, gap)

    if not annotator.reward.scores_text:
        return fill_matrix(micro, values)
    return remember_matrix(annotator, sequences, micro, "Cross scoring", annotator.reward.fingerprint, values)


def remember_matrix(
    annotator: Annotator,
    sequences: Sequences,
    micro: np.ndarray,
    title: str,
    fingerprint: Any,
    values: Callable[[np.ndarray, bool], np.ndarray],
) -> np.ndarray:
    """Return `fill_matrix`. A large one is kept in a file, which a run with another λ maps instead of looking pairs up.

    fingerprint: what the values depend on besides the sequences, as JSON values.
    """
    if micro.shape[0] * micro.shape[1] ** 2 < KEPT or not sequences.key:
        return fill_matrix(micro, values)
    which = hashlib.sha256(np.ascontiguousarray(micro).data).hexdigest()
    target = annotator.cache / "pairs" / hash_content(sequences.key, which, title, fingerprint).hex()
    facts = read_finished(target)
    if annotator.ranks.any(facts is None):  # all ranks look pairs up together, or none does
        computed = fill_matrix(micro, values)
        remember(target, "writes the same numbers", lambda: computed, items=annotator.missing[title][1])
        return computed
    assert facts is not None
    annotator.missing[title] = (0, facts["items"])
    matrix: np.ndarray = np.load(target / "array.npy", mmap_mode="c").view(np.ndarray)  # writable, in this process
    return matrix


def fill_matrix(micro: np.ndarray, values: Callable[[np.ndarray, bool], np.ndarray]) -> np.ndarray:
    """Return [M, B, B] with the values of all pairs of each micro-batch, and 0 where it is short.

    values: values(pairs, first) returns those of pairs (i, j) [P, 2] of some micro-batches, so that only BLOCK are in
        memory at once. first: whether these are the first ones.
    """
    matrix, missing = np.zeros((*micro.shape, micro.shape[1])), None
    size = max(1, BLOCK // micro.shape[1] ** 2)
    for begin in range(0, len(micro), size):
        some = micro[begin : begin + size]
        left, right = np.broadcast_arrays(some[:, :, None], some[:, None, :])
        place = (left >= 0) & (right >= 0)
        try:
            matrix[begin : begin + size][place] = values(np.stack([left[place], right[place]], axis=1), begin == 0)
        except MissingAnnotations as error:  # the other pairs are counted, too
            missing = error
    if missing is not None:
        raise missing
    return matrix
