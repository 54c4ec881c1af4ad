"""Exact log-probabilities of response tokens, without padding and without a [tokens, vocabulary] tensor."""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from var.models.attention import VARLEN, Layout
from var.models.packing import Packed
from var.utils.errors import UserError

HEAD_CHUNK = 256  # response tokens whose logits exist at once; on CPU 128 to 512 take the same time, 64 a tenth more
PART = 16384  # rows of the head's gradient that are computed at once in bf16

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
            repeated = [(token, s.start) for s, row in zip(batch.segments, rows, strict=True) for token in row]
            index = copy_to([token for token, _ in repeated], inputs.device)
            own = copy_to([i for i, (token, start) in enumerate(repeated) if token >= start], inputs.device)
            inputs, positions = inputs[index], positions[index]
        lengths = [len(row) for row in rows]
        bounds = copy_to([0, *accumulate(lengths)], inputs.device, torch.int32)
        options = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        options |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    out = backbone(input_ids=inputs[None], position_ids=positions[None], use_cache=False, **options)
    hidden = out.last_hidden_state[0]
    return hidden if own is None else hidden[own]


def copy_to(numbers: list[int], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Return the numbers as a tensor on a device, without waiting for it."""
    tensor = torch.tensor(numbers, dtype=dtype)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def compute_token_logps(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    """Return [N] nats: the log-softmax of hidden @ head.T at `target`, for hidden [N, H] and head [V, H].

    The result is float32 or better under autocast too. `choose_head_dtype` says in which dtype the head multiplies.
    """
    return _TokenLogps.apply(hidden, head, target, choose_head_dtype(hidden.device, hidden.dtype))


def choose_head_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the head's two factors; their product is summed and returned in float32 or better.

    It is bf16 on CUDA if the model computes in bf16, which is the case if `dtype`, that of its hidden states, is bf16
    or under autocast to bf16. Elsewhere it is `dtype`, but float32 at least.

    Rounding both factors to bf16 changes a token's log-probability by 0.006 nats on average (at most 0.05) and without
    a bias; rounding to TF32 by 0.002 (0.01), and logits in bf16 by 0.02 (0.14). Measured with SmolLM2-135M on 1,528
    tokens by experiments/benchmarks/precision.py.
    """
    half = dtype == torch.bfloat16 or (
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.bfloat16
    )
    return torch.bfloat16 if half and device.type == "cuda" else torch.promote_types(dtype, torch.float32)


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None, start: Tensor | None = None) -> Tensor:
    """Return a @ b in float32 or better, for matrices of one dtype; in `out`, if it is given, without a gradient.

    Products of bf16 are summed in float32. `start` is added.
    """
    with torch.autocast(a.device.type, enabled=False):
        if start is not None:
            return torch.addmm(start, a, b) if a.dtype != torch.bfloat16 else multiply(a, b).add_(start)
        if a.dtype != torch.bfloat16:
            return torch.mm(a, b, out=out)
        if a.is_cuda:
            return torch.mm(a, b, out_dtype=torch.float32, out=out)
        return torch.mm(a.float(), b.float(), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total` in place. Products of bf16 are computed in parts, which are small next to `total`."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype != torch.bfloat16:
            total.addmm_(a, b)
            return
        for part, rows in zip(total.split(PART), a.split(PART), strict=True):
            part.add_(multiply(rows, b))


class _TokenLogps(torch.autograd.Function):
    """The function `compute_token_logps`. Logits of HEAD_CHUNK tokens exist at once; the backward recomputes them.

    The order of operations is that of `torch.nn.functional.linear_cross_entropy` (torch 2.13), so that values and
    gradients on a CPU equal its own to the last bit.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden, head, target)
        ctx.dtype = dtype
        weight = head.to(dtype)
        logps = hidden.new_empty(len(target), dtype=torch.promote_types(dtype, torch.float32))
        for rows, logits in _chunks(weight, logps):
            multiply(hidden[rows].to(dtype), weight.T, out=logits)
            chosen, top = logits.gather(1, target[rows, None]), logits.amax(1, keepdim=True)
            logps[rows] = (chosen - top - logits.sub_(top).exp_().sum(1, keepdim=True).log())[:, 0]
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, target = ctx.saved_tensors
        weight = head.to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head, dtype=grad.dtype) if ctx.needs_input_grad[1] else None
        for rows, logits in _chunks(weight, grad):
            states, upstream = hidden[rows].to(ctx.dtype), grad[rows, None]
            multiply(states, weight.T, out=logits)
            logits.sub_(logits.amax(1, keepdim=True)).exp_()
            # the gradient of the logits without the target's 1, which is added by row below
            grad_logits = logits.mul_(-upstream / logits.sum(1, keepdim=True)).to(ctx.dtype)
            if grad_hidden is not None:
                of_target = upstream * weight[target[rows]]
                grad_hidden[rows] = multiply(grad_logits, weight, start=of_target).to(hidden.dtype)
            if grad_head is not None:
                add_product(grad_head, grad_logits.T, states)
                grad_head.index_add_(0, target[rows], upstream * states)
        return grad_hidden, None if grad_head is None else grad_head.to(head.dtype), None, None


def _chunks(head: Tensor, values: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of `values` [N] and a tensor for their logits [n, V], which all chunks share.

    New tensors for each chunk would cost a tenth of the time on a CPU.
    """
    logits = values.new_empty(min(HEAD_CHUNK, len(values)), len(head))
    for start in range(0, len(values), HEAD_CHUNK):
        size = min(HEAD_CHUNK, len(values) - start)
        yield slice(start, start + size), logits[:size]
