"""Log-probabilities of response tokens, exact, without a [tokens, vocabulary] tensor."""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear_cross_entropy

from var.models.attention import VARLEN, Layout
from var.models.packing import Packed
from var.utils.errors import UserError

HEAD_CHUNK = 256  # response tokens whose logits exist at once; 128 to 512 measured alike on CPU, 64 a tenth slower


# Settings of a model between the hidden state and the logits that a plain linear head would leave out.
LOGIT_CHANGES = {"final_logit_softcapping": None, "logits_scaling": 1, "logit_scale": 1, "attn_logit_softcapping": None}


def check_head(config: Any) -> None:
    """A model that changes its logits after the head (soft caps, scales) would get other numbers here: an error."""
    for name, neutral in LOGIT_CHANGES.items():
        value = getattr(config, name, neutral)
        if value not in (neutral, None):
            raise UserError(f"{config.model_type} sets {name}={value}, which the log-probability engine does not apply")


def hidden_states(backbone: Any, batch: Packed) -> Tensor:
    """[T, H]: the last hidden states of a transformers backbone over the packed tokens."""
    inputs, positions = batch.input_ids, batch.position_ids
    options: dict[str, Any] = {"layout": Layout(batch.segments)}
    back = None
    if backbone.config._attn_implementation in VARLEN:
        rows = [[*range(s.prefix_start, s.prefix_stop), *range(s.start, s.stop)] for s in batch.segments]
        if any(s.prefix_stop for s in batch.segments):  # these kernels know rows only: each branch brings its prompt
            index = torch.tensor([t for row in rows for t in row], device=inputs.device)
            own = [
                at >= s.prefix_stop - s.prefix_start
                for s, row in zip(batch.segments, rows, strict=True)
                for at in range(len(row))
            ]
            inputs, positions, back = inputs[index], positions[index], torch.tensor(own, device=inputs.device)
        lengths = [len(row) for row in rows]
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=inputs.device)
        options = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        options |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    out = backbone(input_ids=inputs[None], position_ids=positions[None], use_cache=False, **options)
    return out.last_hidden_state[0] if back is None else out.last_hidden_state[0][back]


def token_logps(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    """[N] nats: log-softmax of hidden @ head.T at target. hidden [N, H], head [V, H]; fp32 or better.

    In fp32 under autocast too: logits in bf16 put errors of some hundredths of a nat on each token, which sum up in
    a sequence's log-ratio.
    """
    precise = torch.promote_types(hidden.dtype, torch.float32)
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=HEAD_CHUNK, chunking_method=None, acc_policy="compact"
    )
    with torch.autocast(hidden.device.type, enabled=False):
        return -linear_cross_entropy(hidden.to(precise), head.to(precise), target, reduction="none", options=options)
