"""The engine: log-probabilities of response tokens, exact, without padding and without a [tokens, vocabulary] tensor.

Sequences are packed into one row and attend each to itself (`packed_attention`, known to transformers by the name
`packed`); hidden states are gathered where a response token is predicted; head and log-softmax run in chunks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear_cross_entropy, scaled_dot_product_attention
from transformers import AttentionInterface

from var.packing import Packed, Segment
from var.problems import UserError

HEAD_CHUNK = 256  # response tokens whose logits exist at once; 128 to 512 measured alike on CPU, 64 a tenth slower

# Settings of a model between the hidden state and the logits that a plain linear head would leave out.
LOGIT_CHANGES = {"final_logit_softcapping": None, "logits_scaling": 1, "logit_scale": 1, "attn_logit_softcapping": None}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: tuple[Segment, ...] = (),
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of each segment to itself and its prefix. query [1, H, T, D]; returns [1, T, H, D].

    Called by transformers for each layer; `segments` comes from the model call. Without them rows would attend to
    each other, so their absence is an error, and so is a mask from elsewhere.
    """
    if not segments or attention_mask is not None:
        raise RuntimeError("packed attention takes segments and no mask; the model was not called through Policy")
    if sliding_window is not None and any(
        s.stop - s.start + s.prefix_stop - s.prefix_start > sliding_window for s in segments
    ):
        raise UserError(
            f"a sequence is longer than the model's sliding window of {sliding_window}; lower data.max_length"
        )
    if softcap is not None or s_aux is not None:
        raise UserError("the model caps its attention or adds sinks to it, which packed attention does not apply")
    grouped = query.shape[1] != key.shape[1]
    out = []
    for start, stop, prefix_start, prefix_stop in segments:
        q, k, v = query[:, :, start:stop], key[:, :, start:stop], value[:, :, start:stop]
        mask = None
        prefix = prefix_stop - prefix_start
        if prefix:
            k = torch.cat([key[:, :, prefix_start:prefix_stop], k], dim=2)
            v = torch.cat([value[:, :, prefix_start:prefix_stop], v], dim=2)
            mask = torch.ones(stop - start, prefix + stop - start, dtype=torch.bool, device=q.device).tril(prefix)
        out.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(out, dim=2).transpose(1, 2), None


AttentionInterface.register("packed", packed_attention)


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """Within, `model` attends by another implementation: sampling needs padding masks, which `packed` refuses."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def refuse_inexact_head(config: Any) -> None:
    """A model that changes its logits after the head (soft caps, scales) would get other numbers here: an error."""
    for name, neutral in LOGIT_CHANGES.items():
        value = getattr(config, name, neutral)
        if value not in (neutral, None):
            raise UserError(f"{config.model_type} sets {name}={value}, which the log-probability engine does not apply")


def refuse_leaks(model: Any) -> None:
    """A model that carries one token to the next past the attention would let packed rows see each other: an error."""
    kinds = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or model._is_stateful or not model._can_set_attn_implementation():
        what = f"layers of {', '.join(sorted(kinds))}" if kinds else "attention of its own"
        raise UserError(f"{model.config.model_type} has {what}; sequences can only be packed for plain attention")


def hidden_states(backbone: Any, batch: Packed) -> Tensor:
    """[T, H]: the last hidden states of a transformers backbone over the packed tokens."""
    options: dict[str, Any] = {"segments": batch.segments}
    if backbone.config._attn_implementation == "flash_attention_2":
        bounds = [0, *(s.stop for s in batch.segments)]
        cumulative = torch.tensor(bounds, dtype=torch.int32, device=batch.input_ids.device)
        longest = max(s.stop - s.start for s in batch.segments)
        if any(s.prefix_stop > s.prefix_start for s in batch.segments):
            raise UserError("cross scoring shares prompts, which flash_attention_2 cannot; set model.attention=packed")
        options = {"cu_seq_lens_q": cumulative, "cu_seq_lens_k": cumulative}
        options |= {"max_length_q": longest, "max_length_k": longest}
    out = backbone(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False, **options)
    return out.last_hidden_state[0]


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
