"""The reference's hidden states of prompts, for estimates of V(x)."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch

from var.annotate.annotator import Annotator, batch_by_tokens
from var.annotate.keys import hash_prompts
from var.data.sequences import Sequences
from var.models.packing import whole


def prompt_features(annotator: Annotator, sequences: Sequences) -> np.ndarray:
    """Return [G, 2H] float32: the last and the mean hidden state of each group's prompt."""
    reference, first = annotator.reference, sequences.first
    table = annotator.annotations.table("features", reference.fingerprint, pa.list_(pa.float32()))
    keys = hash_prompts(sequences, first)

    @torch.inference_mode()
    def compute(indices: np.ndarray, advance: Callable[[int], None]) -> list[np.ndarray]:
        found: dict[int, np.ndarray] = {}
        for batch in batch_by_tokens(indices, sequences.start[first[indices]].tolist()):
            packed = whole([prompt_tokens(sequences, first[i]) for i in batch]).to(reference.device)
            with reference.precision():
                states = reference.policy.prompt_features(packed)
            found.update(zip(batch, states.float().cpu().numpy(), strict=True))
            advance(len(batch))
        return [found[i] for i in indices]

    return annotator.fill(table, "Prompt features", "prompts", keys, compute).to_numpy()


@torch.inference_mode()
def hidden_states(annotator: Annotator, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Return [T, H] float32 on the CPU for each prompt: its last hidden states."""
    reference = annotator.reference
    found: dict[int, torch.Tensor] = {}
    for batch in batch_by_tokens(np.arange(len(prompts)), list(map(len, prompts))):
        packed = whole([prompts[i] for i in batch]).to(reference.device)
        with reference.precision():
            states = reference.policy.prompt_states(packed)
        found.update(zip(batch, (part.float().cpu() for part in states), strict=True))
    return [found[i].clone() for i in range(len(prompts))]


def prompt_tokens(sequences: Sequences, index: int) -> list[int]:
    """Return the tokens of a sequence's prompt."""
    ids, start, _ = sequences.tokens(index)
    return ids[:start]
