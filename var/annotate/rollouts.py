"""Responses that the policy samples while it trains: the plan of prompts, and the sampling policy's numbers.

`var/training/rollout.py` samples and rewards them. An online run has no sequences before training, so the plan is made
over prompts.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from var.annotate.base import Provider, TrainingSet
from var.annotate.responses import check_prompts
from var.data.plan import ABSENT, make_plan
from var.models.packing import Packed
from var.requirements import OldLogps, Rollout, TokenValues
from var.sampling.local import Transformers
from var.utils.errors import Problems, UserError
from var.utils.provenance import hash_content


class ProvideRollout(Provider[Rollout]):
    """Provides the plan of an online run: micro-batches of prompts."""

    def plan_prompts(self, data: TrainingSet) -> None:
        """Fill `data.plan` and `data.members`, which count rows in place of sequences."""
        self._check(data)
        settings, rows, responses = data.settings, data.rows, data.sampling.responses
        prompts = self._fitting_prompts(data, np.sort(np.unique(rows.keys, return_index=True)[1]))
        size = np.full(len(prompts), responses)
        # The table's own fingerprint would include the cache file's place and time.
        fingerprint = hash_content(rows.keys.tobytes().hex(), list(rows.texts("answer"))).hex()[:16]
        data.plan = make_plan(
            size, size, settings.micro_batch, settings.global_batch, settings.seed,
            settings.last_micro_batch, settings.last_step, fingerprint,
        )  # fmt: skip
        data.members = np.where(data.plan.micro == ABSENT, ABSENT, prompts[data.plan.micro])
        if len(data.plan.micro) % data.plan.window and self.requirement.passes > 1:
            raise UserError("loss.rollout.passes above 1 needs complete steps: set data.last_step=drop")
        data.report.prompts = len(prompts)
        data.report.prompts_dropped_by_plan = data.plan.dropped or None

    def _check(self, data: TrainingSet) -> None:
        """Raise UserError for settings that have no effect, or contradict sampling from the policy."""
        problems = Problems("an online loss samples from the policy while it trains")
        if not data.annotator.reward.scores_text:
            problems.add("reward=score", "reads only the data's own scores; choose a reward that scores new text")
        if not isinstance(data.annotator.sampler, Transformers):
            problems.add("sampler", "must be transformers: responses come from the policy itself")
        if data.sampling.temperature != 1 or data.sampling.top_p != 1:
            problems.add(
                "generate", "temperature and top_p must be 1: ratios and KL are taken to the policy that sampled"
            )
        if data.live:
            problems.add("reference=live", "has no effect: the reference always runs at each rollout")
        if data.settings.responses not in ("auto", "sampled"):
            problems.add(
                f"data.responses={data.settings.responses}", "has no effect: the policy trains on its own responses"
            )
        problems.check()

    def _fitting_prompts(self, data: TrainingSet, prompts: np.ndarray) -> np.ndarray:
        """Return the rows whose prompt leaves room for a complete response. Others are skipped or an error."""
        chat, settings, room = data.annotator.chat, data.settings, data.sampling.max_new_tokens
        check_prompts(data.annotator, data.rows, prompts)
        length = np.array([len(chat.prompt(data.rows[i].prompt)) for i in prompts.tolist()])
        fits = length + room <= settings.max_length
        if settings.overlong != "drop":  # a prompt is never truncated
            problems = Problems("prompts that leave no room for a response")
            for i in prompts[~fits].tolist():
                problems.add(f"row {data.rows[i].id}", f"its prompt and {room} new tokens exceed data.max_length")
            problems.check("Set data.overlong=drop to skip them, or raise data.max_length.")
        data.report.overlong_prompts_dropped = int((~fits).sum()) or None
        if not fits.any():
            raise UserError(
                f"data.max_length={settings.max_length}: no prompt leaves room for "
                f"generate.max_new_tokens={room}. Raise the first or lower the second."
            )
        data.check_lengths(length[fits].max() + room, "prompt with its response")
        return prompts[fits]


class ProvideOldLogps(Provider[OldLogps]):
    """Provides log π of the policy that sampled.

    If each rollout trains at once, the policy has not moved, and the training step takes its own numbers.
    """

    def at_rollout(self, batch: Packed, policy: Any, reference: Any) -> Packed:
        """Keep the policy's numbers, if it will have moved when the batch trains."""
        if not self.requirement.policy_moves:
            return batch
        outputs = policy(batch)
        if isinstance(outputs, tuple):
            return replace(batch, old_logps=outputs[0], old_values=outputs[1])
        return replace(batch, old_logps=outputs)


class ProvideTokenValues(Provider[TokenValues]):
    """Provides nothing by itself: the policy has a value head, and `OldLogps` keeps its values at sampling."""
