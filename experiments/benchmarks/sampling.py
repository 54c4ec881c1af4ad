"""Compare sampling with transformers' `generate`: the same prompts, K responses each, in turn.

    python experiments/benchmarks/sampling.py --prompts 16 --answers 4 --tokens 48

Prompts are the default run's problems. Our sampler reads a prompt once for its K responses, removes a response that has
ended, and draws from the cumulative probability. `generate` copies the prompt K times and continues until the last
response has ended. The texts differ because the random numbers differ, so tokens per second are compared, end tokens
included.
"""

import argparse
import time
from itertools import islice
from typing import Any

import torch
from measure import bootstrap_median
from steps import make_pretrained

from var.data.sources.arithmetic import Arithmetic
from var.models.attention import use_attention
from var.sampling.base import Sampling
from var.sampling.local import sample_tokens


def count_generated(model: Any, chat: Any, prompts: list[list[int]], sampling: Sampling) -> int:
    """Return the number of tokens that `generate` samples, with left padding and all prompts in one batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[chat.end_token] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode(), use_attention(model, "sdpa"):
        out = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
            num_return_sequences=sampling.responses, max_new_tokens=sampling.max_new_tokens,
            eos_token_id=chat.end_token, pad_token_id=chat.end_token,
        )[:, width:].tolist()  # fmt: skip
    return sum(row.index(chat.end_token) + 1 if chat.end_token in row else len(row) for row in out)


def main() -> None:
    """Time both in turn and print tokens per second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a hub id or a folder")
    parser.add_argument("--cache", default="~/.cache/var-align")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--answers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    files = make_pretrained(options)
    model, chat = files.load(), files.chat
    source = Arithmetic(problems=options.prompts, seed=0, kinds=("product", "sum", "gcd"))
    prompts = [chat.prompt(source.row(*record).prompt) for record in islice(source.records(), options.prompts)]
    print(f"{options.model}, {torch.get_num_threads()} threads, {len(prompts)} prompts of {options.answers} answers\n")
    print("| arithmetic | ours, tokens/s | generate, tokens/s | ours/generate [95%] |\n| --- | --- | --- | --- |")
    for name, dtype in (("fp32", None), ("bf16 autocast", torch.bfloat16)):
        speeds: dict[str, list[float]] = {"ours": [], "generate": []}
        for number in range(-1, options.rounds):  # the first is the warm-up
            sampling = Sampling(
                responses=options.answers, temperature=1.0, top_p=1.0, max_new_tokens=options.tokens,
                batch=len(prompts) * options.answers, batch_tokens=65_536, seed=number + 1,
            )  # fmt: skip
            torch.manual_seed(number + 1)
            for who in ("ours", "generate") if number % 2 else ("generate", "ours"):
                started = time.perf_counter()
                with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                    if who == "ours":
                        found = sample_tokens(model, chat, prompts, sampling)
                        count = sum(len(tokens) for responses in found for tokens in responses)
                    else:
                        count = count_generated(model, chat, prompts, sampling)
                if number >= 0:
                    speeds[who].append(count / (time.perf_counter() - started))
        ratio, low, high = bootstrap_median([a / b for a, b in zip(speeds["ours"], speeds["generate"], strict=True)])
        middle = {who: sorted(values)[len(values) // 2] for who, values in speeds.items()}
        print(
            f"| {name} | {middle['ours']:.0f} | {middle['generate']:.0f} | {ratio:.2f} [{low:.2f}, {high:.2f}] |",
            flush=True,
        )


if __name__ == "__main__":
    main()
