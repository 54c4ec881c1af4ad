"""VAR's weights: where a weight is computed, kept, and attached to a batch.

Most estimators read only numbers of the data set: `select` computes their weights before the plan, and responses of
weight 0 are skipped. An in-batch estimator reads every response of a micro-batch under every prompt of it: `compute`
computes its weights once the micro-batches are fixed.

With a live reference, `at_step` computes in-batch weights in each training step, as the paper does. Their mean over the
data set is not known then: it would take a pass of the reference over all micro-batches before training. So they are
multiplied by the number of sequences of a complete micro-batch instead, which makes equal weights 1. These weights are
the cached ones times one constant, so the objective is the same, and its gradients differ in scale.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from var.annotate.annotator import TOKENS
from var.annotate.base import Provider, TrainingSet
from var.annotate.prompt_features import prompt_features
from var.annotate.reference_logps import cached_cross_logps, reference_logps, sum_logps
from var.annotate.rewards import cross_rewards, score_candidates
from var.data.plan import ABSENT
from var.data.rows import Rows
from var.models.cross_scoring import cross_logps, pack_crossed_parts
from var.models.packing import Packed
from var.requirements import WeightColumn, Weights
from var.utils.errors import UserError
from var.weights.estimators import InBatch, compute_weights, scale_temperature
from var.weights.groups import zero_variance
from var.weights.inputs import WeightInputs, micro_batch_inputs

ROULETTE = b"roulette"  # its random numbers are not those of the plan, which has the same seed


class ProvideWeights(Provider[Weights]):
    """Provides exp(r/λ) / Z(x) of each response, of mean 1 over the training responses unless the reference is live."""

    def check_rows(self, data: TrainingSet, rows: Rows) -> None:
        """Reject weights that only their mean over the data set makes finite, if the reference is live."""
        estimator = self.requirement.estimator
        if self._is_live(data) and isinstance(estimator, InBatch) and not estimator.is_bounded:
            raise UserError(
                "reference=live: weights with loss.estimator.reduction=sum and reference_in_numerator=false are finite "
                "only after division by their mean over the data set, which a live reference does not know. Set "
                "reference=cached."
            )

    def select(self, data: TrainingSet) -> np.ndarray | None:
        """Compute the weights, unless they depend on the micro-batch. Return the responses of positive weight."""
        if self.requirement.estimator.needs_plan:
            return None
        draws = np.random.default_rng([data.settings.seed, *ROULETTE]).random(len(data.sequences))
        data.weights = compute_weights(self.requirement, self._inputs(data), torch.from_numpy(draws))
        keep = data.weights.numpy() > 0
        self._report_skipped(data, keep)
        return np.flatnonzero(keep)

    def check_plan(self, data: TrainingSet) -> None:
        """Check that each prompt fits the model with each response of its micro-batch."""
        if "cross_logps" in self.requirement.estimator.inputs:
            data.check_cross_lengths()

    def compute(self, data: TrainingSet) -> None:
        """Compute the weights that depend on the micro-batch, now that the plan is made, unless the reference is live.

        Of live ones, the rewards [M, B, B] and λ are computed.
        """
        if not self.requirement.estimator.needs_plan:
            return
        inputs = self._inputs(data)
        if self._is_live(data):
            self.temperature = scale_temperature(self.requirement, inputs)
            self.cross_rewards, self.width = inputs.cross_rewards, data.members.shape[1]
            self.passes = count_passes(data)
        else:
            data.weights = compute_weights(self.requirement, inputs)

    def batch_fields(self, data: TrainingSet, micro_batch: int, members: np.ndarray) -> dict[str, Any]:
        """Return the weights [B] of the micro-batch, or for a live reference its rewards [B, B] and pairings."""
        if not self._is_live(data):
            assert data.weights is not None
            return {"weights": data.weights[members].float()}
        size = len(members)
        fields: dict[str, Any] = {"cross_rewards": self.cross_rewards[micro_batch, :size, :size].float()}  # type: ignore[index]
        if "cross_logps" in self.requirement.estimator.inputs:
            ids, starts, _ = zip(*(data.sequences.tokens(i) for i in members.tolist()), strict=True)
            fields["crossed"] = pack_crossed_parts(ids, starts, self.passes)
        return fields

    def at_step(self, batch: Packed, policy: Any, reference: Any) -> Packed:
        """Compute the weights of this micro-batch with a live reference."""
        if batch.weights is not None:
            return batch
        if "reference_logps" in self.requirement.estimator.inputs:
            batch = replace(batch, reference_logps=reference(batch))
        if "cross_logps" in self.requirement.estimator.inputs:
            batch = replace(batch, cross_logps=cross_logps(reference, *batch.crossed)[: len(batch)])
        log_weights = self.requirement.estimator(micro_batch_inputs(batch), self.temperature)
        return replace(batch, weights=(log_weights.exp() * self.width).float())

    def _is_live(self, data: TrainingSet) -> bool:
        """Return whether the weights are computed in each step: those that depend on the micro-batch and on π_ref."""
        return data.live and self.requirement.estimator.needs_plan and self.requirement.reads_reference

    def _inputs(self, data: TrainingSet) -> WeightInputs:
        """Compute what the estimator reads, or read it from the cache. Leave π_ref to the steps if it is live."""
        annotator, sequences, estimator = data.annotator, data.sequences, self.requirement.estimator
        columns: dict[str, torch.Tensor] = {}
        if estimator.needs_plan:
            columns["micro"] = torch.from_numpy(data.members)
        if "features" in estimator.inputs:
            columns["features"] = torch.from_numpy(prompt_features(annotator, sequences))
        if "candidates" in estimator.inputs:
            columns["candidates"] = torch.from_numpy(self._candidates(data).copy())
        live = self._is_live(data)
        if "reference_logps" in estimator.inputs and not live:
            columns["reference_logps"] = sum_logps(reference_logps(annotator, sequences, data.shares_prompts))
        if "cross_rewards" in estimator.inputs:
            raw = cross_rewards(annotator, data.rows, sequences, data.members)
            columns["cross_rewards"] = torch.from_numpy(data.scale(raw))
        if "cross_logps" in estimator.inputs and not live:
            columns["cross_logps"] = torch.from_numpy(cached_cross_logps(annotator, sequences, data.members))
        return WeightInputs(
            rewards=data.require_rewards(self.requirement),
            group=torch.from_numpy(sequences.group),
            length=torch.from_numpy(sequences.length),
            **columns,
        )

    def _candidates(self, data: TrainingSet) -> np.ndarray:
        """Return [G, K] rewards, on the run's scale, of K responses that the reference samples for each prompt."""
        estimator = self.requirement.estimator
        if estimator.seed == data.sampling.seed:
            raise UserError(
                f"loss.estimator.seed={estimator.seed} is also generate.seed, so the candidates would be the data's "
                "own responses. Set another seed."
            )
        sampling = replace(data.sampling, responses=estimator.candidates, seed=estimator.seed)
        rows = data.rows.select(data.sequences.row[data.sequences.first])
        return data.scale(score_candidates(data.annotator, rows, sampling))

    def _report_skipped(self, data: TrainingSet, keep: np.ndarray) -> None:
        """Count the responses of weight 0 by cause. Raise UserError if all weights are 0."""
        if keep.all():
            return
        report, sequences, min_weight = data.report, data.sequences, self.requirement.min_weight
        equal = zero_variance(data.require_rewards(self.requirement), torch.from_numpy(sequences.group)).numpy()
        equal &= getattr(self.requirement.estimator, "drop_zero_variance", False)
        report.zero_variance_groups_skipped = len(np.unique(sequences.group[~keep & equal]))
        report.sequences_skipped_with_them = int((~keep & equal).sum())
        if (~keep & ~equal).any():
            small = int((~keep & ~equal).sum())
            if self.requirement.roulette:
                report.sequences_lost_in_roulette = small
            elif min_weight:
                report.sequences_below_min_weight = small
            else:
                report.sequences_of_zero_weight = small
        if not keep.any() and not equal.all():
            lost = "no response is left after roulette" if self.requirement.roulette else "no weight reaches it"
            raise UserError(f"loss.min_weight={min_weight}: {lost}. Lower it, or raise loss.temperature.")
        if not keep.any() and len(sequences.first) == len(sequences):
            raise UserError(
                "each prompt has one response, and this loss compares the responses to a prompt. For single responses "
                "use loss=var_prompt loss.temperature_unit=reward; data.responses=sampled samples several."
            )
        if not keep.any():
            raise UserError(
                "the rewards of each prompt's responses are all equal, so no response is better than another. Sample "
                "more responses per prompt (generate.responses), or use other prompts or another reward."
            )


def count_passes(data: TrainingSet) -> int:
    """Return in how many passes a live reference scores the B×B pairings of each micro-batch.

    They are as many as the largest micro-batch needs for passes of about `TOKENS` tokens, and at most one per prompt.
    """
    present = data.members != ABSENT
    prompt, response = (
        np.where(present, part[data.members], 0).sum(1) for part in (data.sequences.start, data.sequences.length)
    )
    largest = int((prompt + present.sum(1) * response).max())
    return min(data.members.shape[1], -(-largest // TOKENS))


class ProvideWeightColumn(Provider[WeightColumn]):
    """Provides the weight that the data carries for each response."""

    def select(self, data: TrainingSet) -> None:
        """Read the column and check that it is complete."""
        column = data.sequences.column("weight")
        if missing := int(np.isnan(column).sum()):
            row = data.sequences.tokens(int(np.flatnonzero(np.isnan(column))[0]))[2]
            raise UserError(
                f"loss=weighted reads a weight with each response, and {missing} of {len(column)} have none, the first "
                f"in row {row}. Add `weight` to each response, or choose another loss."
            )
        data.weights = torch.from_numpy(column)

    def batch_fields(self, data: TrainingSet, micro_batch: int, members: np.ndarray) -> dict[str, Any]:
        """Return the weights [B]."""
        assert data.weights is not None
        return {"weights": data.weights[members].float()}
