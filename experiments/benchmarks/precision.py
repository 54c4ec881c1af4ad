"""Measure the errors of lower precisions in the output head and in attention, in nats per token, on a CPU.

    python experiments/benchmarks/precision.py

The head's factors are rounded as a GPU would round them, and multiplied in float32. Attention by the `varlen` kernel
is emulated sequence by sequence, under autocast to bf16. The text is this repository's documentation.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.attention.varlen
from steps import make_pretrained
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from var.models.logprobs import compute_hidden_states, compute_token_logps
from var.models.packing import pack
from var.models.policy import Policy

ROOT = Path(__file__).parents[2]


def round_to_tf32(tensor: Tensor) -> Tensor:
    """Return float32 numbers rounded to TF32's 10 bits of mantissa."""
    return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def emulate_varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *_: Any, scale: float, **options: Any) -> Tensor:
    """Compute what torch's kernel computes for sequences between `bounds`, for q, k and v [T, heads, D]."""
    parts = zip(*(t.transpose(0, 1).split(bounds.diff().tolist(), 1) for t in (q, k, v)), strict=True)
    out = [scaled_dot_product_attention(*part, is_causal=True, scale=scale, enable_gqa=True) for part in parts]
    return torch.cat(out, 1).transpose(0, 1)


def main() -> None:
    """Print a table for the head and one for attention."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a hub id or a folder")
    parser.add_argument("--cache", default="~/.cache/var-align")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=192, help="per sequence")
    options = parser.parse_args()
    files = make_pretrained(options)
    model, policy = (loaded := files.load()), Policy(loaded)
    text = "".join(path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
    ids = files.tokenizer(text)["input_ids"][: options.sequences * options.tokens]
    batch = pack([ids[i : i + options.tokens] for i in range(0, len(ids), options.tokens)], [1] * options.sequences)

    head = model.get_output_embeddings().weight.detach()
    with torch.no_grad():
        hidden = compute_hidden_states(model.base_model, batch)[batch.predictor]
        exact = compute_token_logps(hidden, head, batch.target)
        rounded = [tensor.bfloat16().float() for tensor in (hidden, head)]
        tf32 = [round_to_tf32(tensor) for tensor in (hidden, head)]
        all_bf16 = (rounded[0] @ rounded[1].T).bfloat16().float().log_softmax(1)
        found = {
            "float32, in float64": compute_token_logps(hidden.double(), head.double(), batch.target),
            "TF32 factors": compute_token_logps(*tf32, batch.target),
            "bf16 factors, float32 sums": compute_token_logps(*rounded, batch.target),
            "bf16 factors, bf16 logits": all_bf16.gather(1, batch.target[:, None])[:, 0],
        }
    print(
        f"{options.model}, {len(exact)} tokens\n\n| head | mean error | max error | mean signed |\n"
        "| --- | --- | --- | --- |"
    )
    for name, logps in found.items():
        error = (logps - exact).double()
        print(f"| {name} | {error.abs().mean():.1e} | {error.abs().max():.1e} | {error.mean():+.1e} |", flush=True)

    def outcome(attention: str, half: bool) -> tuple[Tensor, Tensor]:
        model.set_attn_implementation(attention)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logps = policy(batch)
        (-logps.mean()).backward()
        return logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    torch.nn.attention.varlen.varlen_attn = emulate_varlen
    exact, gradient = outcome("packed", half=False)
    packed, varlen = outcome("packed", half=True), outcome("varlen", half=True)
    print("\n| attention | mean error | max error | gradient, relative |\n| --- | --- | --- | --- |")
    for name, (one, own), (other, base) in (
        ("varlen and packed in bf16", varlen, packed),
        ("packed in bf16 and float32", packed, (exact, gradient)),
        ("varlen in bf16 and packed in float32", varlen, (exact, gradient)),
    ):
        error = (one - other).abs()
        print(
            f"| {name} | {error.mean():.1e} | {error.max():.1e} | {(own - base).norm() / base.norm():.1e} |", flush=True
        )


if __name__ == "__main__":
    main()
