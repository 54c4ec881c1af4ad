"""Advantages r − V(x), and which responses train by them, as in A-LoL (Baheti et al., arXiv 2305.14718)."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from var.annotate.base import Provider, TrainingSet
from var.annotate.keys import hash_prompts
from var.annotate.prompt_features import hidden_states, prompt_tokens
from var.annotate.responses import sampling_fingerprint
from var.annotate.rewards import score_candidates
from var.annotate.value_fit import fit_value_head, predict_values
from var.data.plan import draw
from var.data.rows import Rows
from var.requirements import Advantages


class ProvideAdvantages(Provider[Advantages]):
    """Provides r − V(x), where V(x) is the reference's expected reward for the prompt."""

    @property
    def development_prompts(self) -> int:
        """The number of prompts that V is fitted on. They are never trained on."""
        return self.requirement.value.development_prompts

    def select(self, data: TrainingSet) -> np.ndarray:
        """Fit V, compute the advantages, and draw the training sequences."""
        rewards = data.require_rewards(self.requirement)
        values = torch.tensor(self._values(data), dtype=torch.float64)
        self.advantages = rewards - values[torch.from_numpy(data.sequences.group)]
        train = draw(self.advantages.numpy(), self.requirement.draw, data.settings.seed)
        data.report.advantages = {
            "positive": float((self.advantages > 0).double().mean()), "mean": float(self.advantages.mean()),
            "drawn": len(train), "distinct": len(np.unique(train)),
        }  # fmt: skip
        return train

    def batch_fields(self, data: TrainingSet, micro_batch: int, members: np.ndarray) -> dict[str, Any]:
        """Return the advantages [B]."""
        return {"advantages": self.advantages[members].float()}

    def _values(self, data: TrainingSet) -> np.ndarray:
        """Return [G] V(x) of each group's prompt, fitted on the reference's own responses to development prompts."""
        annotator, sampling, value = data.annotator, data.sampling, self.requirement.value
        development: Rows = data.development
        rewards = torch.from_numpy(data.scale(score_candidates(annotator, development, sampling)).mean(1)).float()
        fingerprint = {
            **sampling_fingerprint(annotator, sampling), "reference": annotator.reference.fingerprint,
            "head": asdict(value), "development": [bytes(key).hex() for key in development.keys],
            "rewards": rewards.tolist(),
        }  # fmt: skip
        sequences, first = data.sequences, data.sequences.first
        fitted: list[torch.nn.Module] = []

        def compute(indices: np.ndarray, advance: Callable[[int], None]) -> list[float]:
            if not fitted:
                states = hidden_states(annotator, [annotator.chat.prompt(row.prompt) for row in development])
                fitted.append(fit_value_head(value, states, rewards))
            values: list[float] = []
            for begin in range(0, len(indices), 64):
                some = indices[begin : begin + 64]
                values.extend(
                    predict_values(
                        fitted[0], hidden_states(annotator, [prompt_tokens(sequences, first[i]) for i in some])
                    ).tolist()
                )
                advance(len(some))
            return values

        table = annotator.annotations.table("values", fingerprint, pa.float32())
        return annotator.fill(table, "Values", "prompts", hash_prompts(sequences, first), compute).to_numpy()
