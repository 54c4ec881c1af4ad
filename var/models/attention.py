"""Attention of packed sequences, registered with transformers under the names `packed` and `varlen`.

Several sequences share one row of tokens, and each attends only to itself. transformers' own packing does the same,
but drops the boundaries without a warning if a cache or a mask is passed. The functions here raise an error instead.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from var.models.packing import Segment
from var.utils.errors import UserError

VARLEN = ("varlen", "flash_attention_2")  # GPU kernels for sequences of different lengths

# cuDNN builds a plan of about 40 ms for each new pair of lengths, and nearly every call has new ones.
torch.backends.cuda.enable_cudnn_sdp(False)


class Layout:
    """Hold the segments of a packed row on their way through a model's layers.

    A compiled layer specializes on the length of a tuple, and would be recompiled for each number of sequences. It
    passes an object through unchanged.
    """

    def __init__(self, segments: tuple[Segment, ...]) -> None:
        self.segments = segments


def check_attention_call(module: nn.Module, bounds: Any, mask: Tensor | None, options: Mapping[str, Any]) -> None:
    """Raise a UserError if a layer calls its attention with arguments that packed attention does not support.

    Without the boundaries, or with a mask of the model's own, the sequences of a row would attend to each other.
    """
    if bounds is None or mask is not None:
        problem = "builds its own attention mask"
        if bounds is None:
            problem = "does not pass the boundaries of packed sequences to its attention"
        raise UserError(f"{type(module).__name__} {problem}. Models of this family cannot be packed.")
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise UserError(f"{type(module).__name__} uses a soft cap or sinks, which packed attention does not apply.")


@torch.compiler.disable  # its loop over sequences would be recompiled for each batch
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
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of each segment to itself and to its prefix, on any device.

    transformers calls this function in each layer. `layout` comes from the call of the model. query is [1, H, T, D],
    key and value have their own number of heads; the result is [1, T, H, D].
    """
    check_attention_call(module, layout, attention_mask, options)
    assert layout is not None
    segments = layout.segments
    sizes = [s.stop - s.start for s in segments]
    # split instead of slices: the gradient of a slice is a full-size tensor of zeros around the slice
    parts = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True)
    keys_and_values: dict[int, tuple[Tensor, Tensor]] = {}
    out = []
    for segment, (q, k, v) in zip(segments, parts, strict=True):
        mask = None
        keys_and_values[segment.start] = k, v
        if prefix := segment.prefix_stop - segment.prefix_start:
            k, v = (torch.cat(pair, dim=2) for pair in zip(keys_and_values[segment.prefix_start], (k, v), strict=True))
        window = sliding_window or k.shape[2]  # a token attends to itself and to the window − 1 tokens before it
        if prefix or window < k.shape[2]:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
            mask = mask.tril(prefix).triu(prefix - window + 1)
            k, v = (repeat_heads(tensor, q.shape[1], dim=1) for tensor in (k, v))  # a fast kernel takes one or other
        out.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )  # fmt: skip
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


def repeat_heads(tensor: Tensor, heads: int, dim: int) -> Tensor:
    """Return keys or values with `heads` heads in dimension `dim`: each is repeated for the queries that share it."""
    return tensor if tensor.shape[dim] == heads else tensor.repeat_interleave(heads // tensor.shape[dim], dim)


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
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention of each sequence to itself by torch's flash kernel, on CUDA in bf16.

    Shapes are those of `packed_attention`. The kernel takes a single dtype, that of the values: under autocast, the
    rotation of positions returns queries and keys in float32. Not tested on a GPU.
    """
    from torch.nn.attention.varlen import varlen_attn

    check_attention_call(module, cu_seq_lens_q, attention_mask, options)
    assert cu_seq_lens_q is not None
    q, k, v = (tensor[0].transpose(0, 1).to(value.dtype).contiguous() for tensor in (query, key, value))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    options = {"scale": scaling, "window_size": window}
    if "enable_gqa" in signature(varlen_attn).parameters:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    else:  # before torch 2.12
        k, v = (repeat_heads(tensor, q.shape[1], dim=1) for tensor in (k, v))
    bounds = cu_seq_lens_q
    out = varlen_attn(q, k, v, bounds, bounds, max_length_q, max_length_q, **options)
    assert isinstance(out, Tensor)
    return out[None], None


AttentionInterface.register("packed", packed_attention)
AttentionInterface.register("varlen", varlen_attention)


@contextmanager
def use_attention(model: Any, name: str) -> Iterator[None]:
    """Switch `model` to another attention implementation within the context.

    Sampling needs padding masks, which `packed` rejects. Compiled layers run uncompiled within the context, because
    they would be recompiled for each length of the cache.
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
    """Raise a UserError if the model passes information between tokens by anything but attention and positions."""
    kinds = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    # without the argument, a model counts positions from the start of the packed row
    counts_positions = "position_ids" not in signature(model.base_model.forward).parameters
    if kinds or counts_positions or model._is_stateful or not model._can_set_attn_implementation():
        what = "its own positions" if counts_positions else "its own attention"
        what = f"layers of type {', '.join(sorted(kinds))}" if kinds else what
        raise UserError(f"{model.config.model_type} has {what}. Only models with plain attention can be packed.")


def check_lengths(config: Any, longest: int, what: str = "sequence") -> None:
    """Raise a UserError if the longest sequence exceeds what the model computes correctly, before anything is scored.

    longest is in tokens; `what` names the sequence in the message.
    """
    for most, reason in list_lengths(config):
        if longest > most:
            raise UserError(
                f"{config.model_type} {reason}, but the longest {what} has {longest} tokens. Lower data.max_length."
            )


def list_lengths(config: Any) -> Iterator[tuple[int, str]]:
    """Yield each limit on the tokens of a sequence that a model computes correctly, with its reason."""
    rope, table = getattr(config, "rope_parameters", None), getattr(config, "max_position_embeddings", None)
    if table and not rope:
        yield table, f"has {table} positions"
    if rope and rope.get("rope_type") in ("dynamic", "longrope"):
        trained = rope.get("original_max_position_embeddings") or table
        if trained:
            what = f"rope_type={rope['rope_type']}"
            yield trained, f"rescales the positions of a packed row if its longest sequence exceeds {trained} ({what})"
