"""The reference's hidden states of prompts, for estimates of V(x)."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch

from var.annotate.annotator import Annotator, batch_by_tokens, token_key
from var.annotate.cache import as_keys
from var.data.sequences import Sequences
from var.models.packing import whole


def prompt_features(annotator: Annotator, sequences: Sequences) -> np.ndarray:
    """Return [G, 2H] float32: the last and the mean hidden state of each group's prompt."""
    reference, prompts = annotator.reference, group_prompts(sequences)
    table = annotator.annotations.table("features", reference.fingerprint, pa.list_(pa.float32()))
    keys = as_keys([token_key(prompt, ()) for prompt in prompts])

    @torch.inference_mode()
    def compute(indices: np.ndarray, advance: Callable[[int], None]) -> list[np.ndarray]:
        found: dict[int, np.ndarray] = {}
        for batch in batch_by_tokens(indices, [len(prompts[i]) for i in indices]):
            packed = whole([prompts[i] for i in batch]).to(reference.device)
            with reference.precision():
                states = reference.policy.prompt_features(packed)
            found.update(zip(batch, states.float().cpu().numpy(), strict=True))
            advance(len(batch))
        return [found[i] for i in indices]

    values = annotator.fill(table, "Prompt features", "prompts", keys, compute)
    return np.stack(values.to_numpy(zero_copy_only=False))


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


def group_prompts(sequences: Sequences) -> list[list[int]]:
    """Return the tokens of each group's prompt."""
    return [ids[:start] for ids, start, _ in map(sequences.tokens, sequences.first.tolist())]
