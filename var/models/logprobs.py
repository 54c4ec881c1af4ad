"""Exact log-probabilities of response tokens, without padding and without a [tokens, vocabulary] tensor."""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear_cross_entropy

from var.models.attention import VARLEN, Layout
from var.models.packing import Packed
from var.utils.errors import UserError

HEAD_CHUNK = 256  # response tokens whose logits exist at once; on CPU 128 to 512 take the same time, 64 a tenth more

# Settings of a model that change its logits after the linear head, with the value that changes nothing.
LOGIT_CHANGES = {"final_logit_softcapping": None, "logits_scaling": 1, "logit_scale": 1, "attn_logit_softcapping": None}


def check_head(model: Any) -> None:
    """Raise a UserError if the model's logits are more than a linear map of its hidden states."""
    kind = model.config.model_type
    for name, neutral in LOGIT_CHANGES.items():
        value = getattr(model.config, name, neutral)
        if value not in (neutral, None):
            raise UserError(f"{kind} sets {name}={value}, which the computation of log-probabilities does not apply.")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(f"{kind} has a bias in its head, which the computation of log-probabilities does not apply.")


def compute_hidden_states(backbone: Any, batch: Packed) -> Tensor:
    """Return [T, H]: the last hidden states of a transformers backbone for the packed tokens."""
    inputs, positions = batch.input_ids, batch.position_ids
    options: dict[str, Any] = {"layout": Layout(batch.segments)}
    own = None
    if backbone.config._attn_implementation in VARLEN:
        rows = [[*range(s.prefix_start, s.prefix_stop), *range(s.start, s.stop)] for s in batch.segments]
        if any(s.prefix_stop for s in batch.segments):  # these kernels know no prefixes: repeat it for each branch
            index = torch.tensor([token for row in rows for token in row], device=inputs.device)
            own = [token >= s.start for s, row in zip(batch.segments, rows, strict=True) for token in row]
            inputs, positions = inputs[index], positions[index]
        lengths = [len(row) for row in rows]
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=inputs.device)
        options = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        options |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    out = backbone(input_ids=inputs[None], position_ids=positions[None], use_cache=False, **options)
    hidden = out.last_hidden_state[0]
    return hidden if own is None else hidden[torch.tensor(own, device=inputs.device)]


def compute_token_logps(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    """Return [N] nats: the log-softmax of hidden @ head.T at `target`, for hidden [N, H] and head [V, H].

    The result is float32 or better under autocast too. Logits in bf16 have errors of some hundredths of a nat per
    token, which add up in the log-ratio of a sequence.
    """
    precise = torch.promote_types(hidden.dtype, torch.float32)
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=HEAD_CHUNK, chunking_method=None, acc_policy="compact"
    )
    with torch.autocast(hidden.device.type, enabled=False):
        return -linear_cross_entropy(hidden.to(precise), head.to(precise), target, reduction="none", options=options)
