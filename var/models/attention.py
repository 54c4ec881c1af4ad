"""The engine: log-probabilities of response tokens, exact, without padding and without a [tokens, vocabulary] tensor.

Sequences are packed into one row and attend each to itself (`packed_attention`, known to transformers by the name
`packed`); hidden states are gathered where a response token is predicted; head and log-softmax run in chunks.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from var.models.packing import Segment
from var.utils.errors import UserError

VARLEN = ("varlen", "flash_attention_2", "flash_attention_3")  # kernels for rows of different lengths; on a GPU


def check_attention(softcap: float | None, s_aux: Tensor | None) -> None:
    if softcap is not None or s_aux is not None:
        raise UserError("the model caps its attention or adds sinks to it, which packed attention does not apply")


def check_segments(module: nn.Module, bounds: Any, attention_mask: Tensor | None) -> None:
    """A family that does not hand on where its rows begin, or masks them by itself, would let them attend to others."""
    if bounds is None or attention_mask is not None:
        what = "does not hand on to its attention where a packed row's sequences begin"
        if bounds is not None:
            what = "makes a mask of its own for its attention"
        raise UserError(f"{type(module).__name__} {what}; models of this family cannot be packed")


class Layout:
    """Who attends to whom, on its way through a model's layers. Compiled ones tell a tuple by its length, and would
    be compiled anew for each number of sequences; an object they hand on."""

    def __init__(self, segments: tuple[Segment, ...]) -> None:
        self.segments = segments


@torch.compiler.disable  # its loop over sequences would be compiled anew for each batch
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of each segment to itself and its prefix. query [1, H, T, D]; returns [1, T, H, D].

    Called by transformers for each layer; `layout` comes from the model call. Without it rows would attend to
    each other, so its absence is an error, and so is a mask from elsewhere.
    """
    check_segments(module, layout, attention_mask)
    assert layout is not None
    segments = layout.segments
    if sliding_window is not None and any(
        s.stop - s.start + s.prefix_stop - s.prefix_start > sliding_window for s in segments
    ):
        raise UserError(
            f"a sequence is longer than the model's sliding window of {sliding_window}; lower data.max_length"
        )
    check_attention(softcap, s_aux)
    grouped = query.shape[1] != key.shape[1]
    sizes = [s.stop - s.start for s in segments]
    # split, not slices: the gradient of a slice is a whole tensor of zeros with the slice in it
    parts = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    out = []
    for segment, (q, k, v) in zip(segments, parts, strict=True):
        mask = None
        seen[segment.start] = k, v
        if prefix := segment.prefix_stop - segment.prefix_start:
            k, v = (torch.cat(pair, dim=2) for pair in zip(seen[segment.prefix_start], (k, v), strict=True))
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(prefix)
        out.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


@torch.compiler.disable
def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each row to itself by torch's own flash kernel, on CUDA in bf16. Shapes as packed_attention.

    Never run here, for want of a GPU.
    """
    from torch.nn.attention.varlen import varlen_attn

    check_segments(module, cu_seq_lens_q, attention_mask)
    assert cu_seq_lens_q is not None
    check_attention(softcap, s_aux)
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    bounds, grouped = cu_seq_lens_q, q.shape[1] != k.shape[1]
    out = varlen_attn(
        q, k, v, bounds, bounds, max_length_q, max_length_q, scale=scaling, window_size=window, enable_gqa=grouped
    )
    assert isinstance(out, Tensor)
    return out[None], None


AttentionInterface.register("packed", packed_attention)


AttentionInterface.register("varlen", varlen_attention)


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """Within, `model` attends by another implementation: sampling needs padding masks, which `packed` refuses.

    What is compiled runs as it is written there: each length of a cache would be compiled anew.
    """
    before = model.config._attn_implementation
    compiled = any(module._compiled_call_impl for module in model.modules())
    model.set_attn_implementation(name)
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        model.set_attn_implementation(before)


def check_packable(model: Any) -> None:
    """A model that carries one token to the next past the attention would let packed rows see each other: an error."""
    kinds = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    counts = "position_ids" not in signature(model.base_model.forward).parameters  # from the packed row's beginning
    if kinds or counts or model._is_stateful or not model._can_set_attn_implementation():
        what = "positions of its own" if counts else "attention of its own"
        what = f"layers of {', '.join(sorted(kinds))}" if kinds else what
        raise UserError(f"{model.config.model_type} has {what}; sequences can only be packed for plain attention")


def check_lengths(config: Any, attention: str, longest: int, what: str = "sequence") -> None:
    """Sequences that a model takes, and the engine would get wrong or not at all: told before anything is scored."""
    advice = f"the longest {what} has {longest} tokens; lower data.max_length"
    window, layers = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = getattr(config, "use_sliding_window", True) and (layers is None or "sliding_attention" in layers)
    if window and slides and attention == "packed" and longest > window:
        raise UserError(f"{config.model_type} attends within a sliding window of {window}, and {advice}")
    rope, table = getattr(config, "rope_parameters", None), getattr(config, "max_position_embeddings", None)
    if table and not rope and longest > table:
        raise UserError(f"{config.model_type} knows {table} positions, and {advice}")
    if rope and rope.get("rope_type") in ("dynamic", "longrope"):
        trained = rope.get("original_max_position_embeddings") or table
        if trained and longest > trained:
            raise UserError(
                f"{config.model_type} turns all of a packed row by its longest sequence, where that is beyond "
                f"{trained} tokens (positions of kind {rope['rope_type']}), and {advice}"
            )
