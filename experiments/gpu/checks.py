"""Measure kernels, precision, synchronizations and sampling of one process on this device.

    python experiments/gpu/checks.py <folder> [--dry]

Everything is measured through the functions that training and sampling use, on a Qwen2.5-0.5B with random weights. With
--dry the model and the lengths are tiny, and the checks also run on a CPU. There, those that need CUDA do not apply.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from findings import Findings
from torch import Tensor
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM

import var.models.attention as attention
from notebooks.tiny import byte_tokenizer
from var.annotate.reference_logps import ProvideMismatchedLogps
from var.data.chat import Chat
from var.losses.dpo import DPO
from var.losses.kto import KTO
from var.losses.sft import SFT
from var.models.cross_scoring import pack_mismatched
from var.models.logprobs import compute_token_logps
from var.models.packing import Packed, pack, pack_tree
from var.models.policy import Policy
from var.requirements import MismatchedLogps
from var.sampling.base import Sampling
from var.sampling.local import sample_tokens
from var.training.module import AlignmentModule
from var.training.schedule import Schedule

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
QWEN = {  # Qwen2.5-0.5B
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151_936, "max_position_embeddings": 32_768, "tie_word_embeddings": True,
}  # fmt: skip


def make_model(dry: bool, kind: str = "packed", dtype: torch.dtype = torch.float32) -> Any:
    """Return a random Qwen2 on the device, in evaluation mode. Its weights are those of any other call."""
    torch.manual_seed(0)
    config = Qwen2Config(**(TINY if dry else QWEN), bos_token_id=256, eos_token_id=257)
    config._attn_implementation = kind
    return Qwen2ForCausalLM(config).eval().to(DEVICE, dtype)


def make_rows(lengths: list[int], seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Return random sequences of these lengths in tokens, and where their responses start: at a third."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n,), generator=draw).tolist() for n in lengths], [n // 3 for n in lengths]


def autocast() -> torch.autocast:
    """Return the context in which training computes on a GPU."""
    return torch.autocast(DEVICE.type, torch.bfloat16)


def synchronize() -> None:
    """Wait for the device."""
    if CUDA:
        torch.cuda.synchronize()


def measure_seconds(call: Callable[[], Any], rounds: int = 5) -> float:
    """Return the least seconds of a call, after one that is not timed."""
    call()
    best = float("inf")
    for _ in range(rounds):
        synchronize()
        started = time.perf_counter()
        call()
        synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def run_step(model: Any, batch: Packed) -> tuple[Tensor, Tensor]:
    """Return log-probabilities [N] and the gradient of their sum as one vector, in bf16 autocast."""
    model.zero_grad(set_to_none=True)
    with autocast():
        logps = Policy(model)(batch.to(DEVICE))
    logps.sum().backward()
    return logps.detach().float(), torch.cat([p.grad.flatten().float() for p in model.parameters()])


def check_dtypes(found: Findings, item: str, dry: bool) -> None:
    """Record the dtypes in which the layers call the attention."""
    seen: set[tuple[str, ...]] = set()

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Any:
        seen.add(tuple(str(t.dtype).removeprefix("torch.") for t in (query, key, value)))
        return attention.packed_attention(module, query, key, value, *arguments, **options)

    AttentionInterface.register("recorded", record)
    with autocast(), torch.no_grad():
        Policy(make_model(dry, "recorded"))(pack(*make_rows([40, 20])).to(DEVICE))
    value = "; ".join(sorted(" ".join(dtypes) for dtypes in seen))
    one = all(len(set(dtypes)) == 1 for dtypes in seen)
    expected = "one dtype, or kernels that cast (see the next findings)"
    found.add(item, "dtypes of q, k, v", value, "", expected, True if one else None)


def check_varlen(found: Findings, item: str, dry: bool) -> None:
    """Compare varlen with packed attention."""
    names = ("log-probabilities", "gradients")
    if not CUDA:
        for name in names:
            found.add(item, f"varlen and packed, {name}", None, "", "needs CUDA", None)
        return
    lengths = [40, 300, 90, 23] if dry else [700, 1000, 512, 90, 333]
    for shared in (False, True):
        ids, starts = make_rows(lengths)
        batch = pack_tree([ids[0], ids[1]], [ids[2:], ids[3:]]) if shared else pack(ids, starts)
        exact = Policy(make_model(dry))(batch.to(DEVICE)).detach()
        packed, packed_grad = run_step(make_model(dry), batch)
        varlen, varlen_grad = run_step(make_model(dry, "varlen"), batch)
        what = "shared prompts" if shared else "separate prompts"
        rounding = float((packed - exact).abs().mean())
        gap = float((varlen - packed).abs().mean())
        bound = 2 * rounding + 1e-3
        found.add(
            item, f"varlen and packed, log-probabilities, {what}", gap, "nats, mean per token", f"at most {bound:.2g}",
            gap <= bound,
        )  # fmt: skip
        apart = float((varlen_grad - packed_grad).norm() / packed_grad.norm())
        found.add(item, f"varlen and packed, gradients, {what}", apart, "relative", "at most 0.05", apart <= 0.05)


def check_speed_of_attention(found: Findings, item: str, dry: bool) -> None:
    """Time forward passes with lengths that no earlier call had."""
    steps = 2 if dry else 8
    seconds = {}
    for kind, cudnn in (("packed", True), ("packed", False), *([("varlen", False)] if CUDA else [])):
        before = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        model = make_model(dry, kind)
        policy = Policy(model)
        base = 16 if dry else 256
        batches = [
            pack(*make_rows([base + 7 * step + 3 * row + (0 if kind == "varlen" else cudnn) for row in range(8)])).to(
                DEVICE
            )
            for step in range(steps + 1)
        ]  # lengths that no earlier call had
        try:
            with autocast(), torch.no_grad():
                policy(batches.pop())
                synchronize()
                started = time.perf_counter()
                for batch in batches:
                    policy(batch)
                synchronize()
            seconds[kind, cudnn] = (time.perf_counter() - started) / steps
        finally:
            torch.backends.cuda.enable_cudnn_sdp(before)
    for (kind, cudnn), value in seconds.items():
        name = f"forward with new lengths, {kind}{', cuDNN allowed' if cudnn else ''}"
        found.add(item, name, 1000 * value, "ms", "see the ratio", None)
    ratio = seconds["packed", True] / seconds["packed", False]
    fast = ratio <= 1.2
    found.add(item, "cuDNN slows new lengths down by", ratio, "times", "at most 1.2", fast if CUDA else None)
    if CUDA:
        ratio = seconds["packed", False] / seconds["varlen", False]
        found.add(item, "packed takes as long as varlen", ratio, "times", "at most 1.2", ratio <= 1.2)
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    found.add(item, "cuDNN's attention is allowed in this project", allowed, "", "False", not allowed if CUDA else None)


def check_shared_prompts(found: Findings, item: str, dry: bool) -> None:
    """Time a prompt that its answers share, and copies of it."""
    prompt, answer, count = (24, 8, 4) if dry else (1024, 128, 8)
    ids, _ = make_rows([prompt] + [answer] * count)
    shared = pack_tree([ids[0]], [ids[1:]]).to(DEVICE)
    repeated = pack([ids[0] + part for part in ids[1:]], [prompt] * count).to(DEVICE)
    policy = Policy(make_model(dry))
    with autocast(), torch.no_grad():
        fast, slow = (measure_seconds(lambda b=batch: policy(b)) for batch in (shared, repeated))
    ratio = fast / slow
    tokens = len(shared.input_ids) / len(repeated.input_ids)
    bound = min(1.0, 3 * tokens)
    name = f"time with a shared prompt of {prompt} tokens over time with copies"
    found.add(item, name, ratio, "times", f"at most {bound:.2g}", ratio <= bound if CUDA else None)


def check_head(found: Findings, item: str, dry: bool) -> None:
    """Time the head next to the layers, and measure its error against float64."""
    lengths = [40, 60] if dry else [768] * 4
    model, batch = make_model(dry), pack(*make_rows(lengths)).to(DEVICE)
    policy, weight = Policy(model), model.get_output_embeddings().weight
    with autocast(), torch.no_grad():
        hidden = policy.predictor_states(batch)
        scale = 12.0 / float((hidden[:256].float() @ weight.float().T).std())  # logits as spread as a trained model's
    states = (hidden * scale).detach()

    def head() -> None:
        inputs = states.detach().requires_grad_()
        with autocast():
            logps = compute_token_logps(inputs, weight, batch.target)
        logps.sum().backward()

    def layers() -> None:
        with autocast():
            out = policy.predictor_states(batch)
        out.sum().backward()

    ratio = measure_seconds(head) / measure_seconds(layers)
    model.zero_grad(set_to_none=True)
    found.add(item, "head over layers, forward and backward", ratio, "times", "at most 1", ratio <= 1 if CUDA else None)
    with autocast(), torch.no_grad():
        logps = compute_token_logps(states[:256], weight, batch.target[:256]).double().cpu()
    exact = (states[:256].double() @ weight.double().T).log_softmax(-1).gather(1, batch.target[:256, None])[:, 0].cpu()
    exact = exact.detach()
    error = (logps - exact).abs()
    name = "error of the head, given its inputs"
    found.add(item, f"{name}, mean", float(error.mean()), "nats per token", "at most 0.01", float(error.mean()) <= 0.01)
    signed = abs(float((logps - exact).mean()))
    found.add(item, f"{name}, bias", signed, "nats per token", "at most 0.003", signed <= 0.003)


@contextmanager
def count_synchronizations() -> Iterator[list[str]]:
    """Yield a list that receives an entry for each time the host waits for the GPU."""
    seen: list[str] = []
    torch.set_warn_always(True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if CUDA:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            if CUDA:
                torch.cuda.set_sync_debug_mode("default")
            seen += [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]
            torch.set_warn_always(False)


def check_synchronizations(found: Findings, item: str, dry: bool) -> None:
    """Count how often the host waits for the device, in a micro-batch and in sampling."""
    model = make_model(dry)
    rows, schedule = make_rows([40, 30, 60, 20]), Schedule(kind="constant", warmup=0.0, floor=0.0)
    pairing = [ProvideMismatchedLogps(MismatchedLogps())]
    for name, loss, providers in (("SFT", SFT(), []), ("DPO", DPO(beta=0.1), []), ("KTO", KTO(), pairing)):
        tokens = sum(len(ids) - start for ids, start in zip(*rows, strict=True))
        fields: dict[str, Any] = {"global_tokens": float(tokens), "global_sequences": 4.0}
        if name != "SFT":
            fields["reference_logps"] = torch.full((tokens,), -5.0)
        if name == "KTO":
            fields["desirable"] = torch.tensor([True, False] * 2)
            fields["mismatched"] = pack_mismatched(*rows)
            fields["mismatched_reference_logps"] = torch.full((4,), -100.0, dtype=torch.float64)
        batch = pack(*rows, **fields).to(DEVICE)
        module = AlignmentModule(Policy(model), loss, providers, torch.optim.AdamW, schedule)
        module._trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=1)  # all that training_step reads
        for attempt in range(2):  # the first one compiles and caches
            with count_synchronizations() as seen, autocast():
                module.training_step(batch, attempt).backward()
        value = len(seen) if CUDA else None
        found.add(
            item, f"synchronizations of a {name} micro-batch", value, "", "at most 1", len(seen) <= 1 if CUDA else None
        )
    tokens = 16 if dry else 64
    sampling = make_sampling(2, tokens)
    chat = Chat(byte_tokenizer())
    sample_tokens(model, chat, rows[0], make_sampling(2, 2))
    with count_synchronizations() as seen, autocast():
        sample_tokens(model, chat, rows[0], sampling)
    per = 16 * len(seen) / tokens
    count, few = (per, per <= 1) if CUDA else (None, None)
    found.add(item, "synchronizations per 16 sampled tokens", count, "", "at most 1", few)
    for place in sorted(set(seen), key=seen.count)[-5:]:
        print(f"       {seen.count(place)} × {place}")


def make_sampling(responses: int, tokens: int) -> Sampling:
    """Return sampling settings for one batch."""
    return Sampling(
        responses=responses, temperature=1.0, top_p=1.0, max_new_tokens=tokens, batch=4096, batch_tokens=2**20, seed=0
    )


def check_sampling(found: Findings, item: str, dry: bool) -> None:
    """Time sampling from float32 and from bf16 weights, and measure its memory."""
    tokens = 8 if dry else 64
    ids, _ = make_rows([20] * (2 if dry else 16))
    chat, seconds = Chat(byte_tokenizer()), {}
    for name, dtype in (("float32 weights and autocast", torch.float32), ("bf16 weights", torch.bfloat16)):
        model = make_model(dry, dtype=dtype)
        with autocast():
            seconds[name] = measure_seconds(lambda m=model: sample_tokens(m, chat, ids, make_sampling(4, tokens)), 2)
        per = 1000 * seconds[name] / tokens
        found.add(item, f"milliseconds per sampled token, {name}", per, "ms", "see the ratio", None)
    ratio = seconds["float32 weights and autocast"] / seconds["bf16 weights"]
    found.add(item, "float32 weights over bf16 weights", ratio, "times", "at most 1.2", ratio <= 1.2 if CUDA else None)
    peak = None
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with autocast():
            sample_tokens(model, chat, ids, make_sampling(4, tokens))
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    found.add(item, "memory that sampling adds at its peak", peak, "MiB", "see the dry run's figure", None)


def check_determinism(found: Findings, item: str, dry: bool) -> None:
    """Compare the gradients of two equal steps."""
    batch = pack(*make_rows([40, 30] if dry else [512, 300, 700]))
    model = make_model(dry)
    first, second = (run_step(model, batch)[1] for _ in range(2))
    same = bool(torch.equal(first, second))
    found.add(item, "two equal steps give equal gradients", same, "", "True", same if CUDA else None)


CHECKS = {  # and the suspected fault that each decides
    check_dtypes: "Under bf16 autocast, queries and keys reach the attention in float32, and values in bf16.",
    check_varlen: "The varlen kernel fails under bf16 autocast, or differs from packed attention by more than bf16.",
    check_speed_of_attention: "Packed attention calls a kernel per sequence, and cuDNN plans each new pair of lengths.",
    check_shared_prompts: "A mask with grouped key heads falls back to the slow math kernel where prompts are shared.",
    check_head: "The head takes longer than the layers if it multiplies in float32, or loses precision if it does not.",
    check_synchronizations: "The host waits for the device several times per micro-batch and per sampled token.",
    check_sampling: "Sampling under autocast casts the float32 weights again for each token.",
    check_determinism: "Reductions on a GPU are not deterministic, so that a resumed run differs in the last bits.",
}


def main() -> None:
    """Run all checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry", action="store_true", help="tiny sizes, also on a CPU")
    options = parser.parse_args()
    if not CUDA and not options.dry:
        raise SystemExit("No CUDA device was found. DRY=1 checks that the script runs through.")
    warnings.filterwarnings("ignore", message=".*lr_scheduler.*")
    found = Findings(options.folder)
    name = torch.cuda.get_device_name() if CUDA else "cpu"
    found.add("The device and versions of these findings", "device", f"{name}, torch {torch.__version__}", "", "", None)
    for check, item in CHECKS.items():
        found.run(check, item, options.dry)


if __name__ == "__main__":
    main()
