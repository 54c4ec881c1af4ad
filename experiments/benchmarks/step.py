"""One training step beside the usual one: this project's SFT, VAR and DPO, the padded step, and TRL's trainers.

    python experiments/benchmarks/step.py --data <folder of HHA files> --check

What is timed is forward and backward (with --optimizer AdamW's fused update too) on a batch that is ready: no data
loading, no logging. Ours goes through `AlignmentModule.training_step`. The padded step is right-padded, with full
logits, log_softmax and gather. TRL's is its trainer's own collator and `compute_loss`, completion-only labels, DPO with
reference log-probabilities given. All models of a run are copies that share one set of parameters; tokens and response
masks are the same. A batch is 8 sequences: SFT and VAR take the chosen answers of 8 rows, DPO the pairs of the first 4.
With --data they are HHA dialogues no longer than the limit: of 1,001 random batches, the most typical in padding, share
of response tokens and longest sequence. Without, random tokens in the lengths of that batch (LENGTHS).

Rounds are interleaved: each runs every step once, in turn forwards and backwards. Ratios are taken within a round;
printed are their median and its 95% interval (bootstrap over rounds). Peak memory is what a step adds to the process
that holds the model (activations and gradients; on a CPU resident memory, on CUDA what torch allocates): each step
in a forked process of its own, twice after a warm-up. A floor of --check is missed where its whole interval lies
beyond it. On CUDA everything runs in bf16 autocast, on a CPU in fp32.
"""

import argparse
import copy
import ctypes
import gc
import importlib.metadata
import importlib.util
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from var.data.sources.hha import HHA
from var.estimators import Global
from var.logprobs import token_logps  # noqa: F401  registers the packed attention
from var.losses.dpo import DPO
from var.losses.sft import SFT
from var.losses.var import VAR
from var.module import AlignmentModule, Schedule
from var.packing import pack
from var.policy import Policy
from var.pretrained import Pretrained

BETA = 0.1
Pair = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected
Step = Callable[[], Tensor]

# Tokens of prompt, chosen and rejected answer in the HHA batches read with --data, for a run without.
LENGTHS: dict[int, list[tuple[int, int, int]]] = {}

STEPS = ["SFT", "VAR", "padded SFT", "padded VAR", "TRL SFT", "TRL SFT padding_free", "DPO", "padded DPO", "TRL DPO"]
COMPARED = [  # the first is ours; whether both compute the same loss
    ("VAR", "SFT", False),
    ("SFT", "padded SFT", True),
    ("VAR", "padded VAR", True),
    ("DPO", "padded DPO", True),
    ("SFT", "TRL SFT", True),
    ("SFT", "TRL SFT padding_free", True),
    ("VAR", "TRL SFT", False),
    ("VAR", "TRL SFT padding_free", False),
    ("DPO", "TRL DPO", True),
]
FLOORS = {("VAR", "SFT"): 0.98, ("VAR", "TRL SFT"): 1.8, ("VAR", "TRL SFT padding_free"): 1.5}
MEMORY_CEILING = {("VAR", "SFT"): 1.0}


def pretrained(options: argparse.Namespace) -> Pretrained:
    return Pretrained(
        name="smollm2-135m",
        path="HuggingFaceTB/SmolLM2-135M-Instruct" if options.model == "smollm2-135m" else options.model,
        revision=None,
        chat_template=None,
        dtype="float32",
        attention="packed",
        trust_remote_code=False,
        gradient_checkpointing=False,
        architecture={},
        cache=os.path.expanduser(options.cache),
    )


def load(options: argparse.Namespace) -> Any:
    if not options.tiny:
        return pretrained(options).load().to(options.device)
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=49152, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    config._attn_implementation = "packed"
    return LlamaForCausalLM(config).eval().to(options.device)


def read(options: argparse.Namespace) -> dict[int, list[Pair]]:
    """longest → 8 pairs."""
    rng = random.Random(0)
    if options.data is None:
        draw = lambda n: [rng.randrange(100, 40_000) for _ in range(n)]  # noqa: E731
        return {limit: [(draw(p), draw(c), draw(r)) for p, c, r in LENGTHS[limit]] for limit in options.longest}
    chat, source, rows = pretrained(options).chat, HHA(folder=options.data, subsets=("helpful_base",)), list[Pair]()
    for where, record in source.records():
        if (row := source.row(where, record)) is None:
            continue
        better, worse = (chat.encode(row.prompt, response.text) for response in row.responses)
        rows.append((better.ids[: better.start], better.ids[better.start :], worse.ids[worse.start :]))
    batches = {}
    for limit in options.longest:
        short = [pair for pair in rows if len(pair[0]) + max(len(pair[1]), len(pair[2])) <= limit]
        batches[limit] = typical([rng.sample(short, 8) for _ in range(1001)])
    return batches


def typical(batches: list[list[Pair]]) -> list[Pair]:
    """The batch nearest to the medians in padding, share of response tokens and longest sequence."""
    shapes = []
    for pairs in batches:
        ids, starts = sequences("SFT", pairs)
        shapes.append((padding(ids), 1 - sum(starts) / sum(map(len, ids)), max(map(len, ids))))
    middle = [statistics.median(column) for column in zip(*shapes, strict=True)]
    far = [sum(abs(x / m - 1) for x, m in zip(shape, middle, strict=True)) for shape in shapes]
    return batches[far.index(min(far))]


def padding(ids: list[list[int]]) -> float:
    return len(ids) * max(map(len, ids)) / sum(map(len, ids))


def sequences(name: str, pairs: list[Pair]) -> tuple[list[list[int]], list[int]]:
    """Tokens and where each response starts: better and worse alternate for DPO."""
    answered = [(p, a) for p, c, r in pairs[:4] for a in (c, r)] if "DPO" in name else [(p, c) for p, c, _ in pairs]
    return [p + a for p, a in answered], [len(p) for p, _ in answered]


def stored(name: str, model: Any, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """What the data brings: weights [8] of mean 1, and reference log-probabilities [N], near the policy's."""
    ids, starts = sequences(name, pairs)
    batch, generator = pack(ids, starts), torch.Generator().manual_seed(0)
    weights = torch.randn(8, generator=generator).exp()
    noise = 0.3 * torch.randn(len(batch.target), generator=generator)
    with torch.no_grad():
        logps = Policy(model)(batch.to(model.device)).float().cpu()
    return weights / weights.mean(), logps + noise


def ours(name: str, model: Any, pairs: list[Pair]) -> Step:
    ids, starts = sequences(name, pairs)
    weights, reference = stored(name, model, pairs)
    tokens = float(sum(map(len, ids)) - sum(starts))
    batch = pack(ids, starts, global_tokens=tokens, global_sequences=8.0, weights=weights, reference_logps=reference)
    batch = batch.to(model.device)
    loss = {"SFT": SFT(), "VAR": VAR(estimator=Global()), "DPO": DPO(beta=BETA)}[name]
    schedule = Schedule(kind="constant", warmup=0.0, floor=0.0)
    module = AlignmentModule(Policy(model), loss, torch.optim.AdamW, schedule)
    module._trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=1)  # all that training_step asks of it
    return lambda: module.training_step(batch, 0)


def padded(name: str, model: Any, pairs: list[Pair]) -> Step:
    """The step most code takes: [B, L, V] logits, log_softmax, gather, mask."""
    ids, starts = sequences(name, pairs)
    weights, reference = (x.to(model.device) for x in stored(name, model, pairs))
    longest = max(map(len, ids))
    tokens, attended, mask = (torch.zeros(8, longest, dtype=torch.long) for _ in range(3))
    for i, (row, start) in enumerate(zip(ids, starts, strict=True)):
        tokens[i, : len(row)], attended[i, : len(row)], mask[i, start : len(row)] = torch.tensor(row), 1, 1
    tokens, attended, mask = (x.to(model.device) for x in (tokens, attended, mask))
    length = [len(row) - start for row, start in zip(ids, starts, strict=True)]
    reference = torch.stack([part.sum() for part in reference.split(length)])
    model = sharing(model)

    def step() -> Tensor:
        logits = model(input_ids=tokens, attention_mask=attended, use_cache=False).logits
        logps = logits[:, :-1].float().log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
        summed = (logps * mask[:, 1:]).sum(1)
        if "DPO" in name:
            ratio = summed - reference
            return -logsigmoid(BETA * (ratio[0::2] - ratio[1::2])).mean()
        return -(summed * weights if "VAR" in name else summed).sum() / mask.sum()

    return step


def trl(name: str, model: Any, pairs: list[Pair]) -> Step:
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[EOS]": 1, "a": 2}, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # the tokens come ready; a trainer only asks for one of these
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]")
    free = "padding_free" in name
    common = {"output_dir": tempfile.mkdtemp(), "report_to": "none", "per_device_train_batch_size": 8}
    common |= {"use_cpu": model.device.type == "cpu", "bf16": False, "gradient_checkpointing": False}
    common |= {"max_length": None, "disable_tqdm": True}
    peer = sharing(model)
    ids, starts = sequences(name, pairs)
    if "DPO" in name:
        text = datasets.Dataset.from_dict({"prompt": ["a"], "chosen": ["a a"], "rejected": ["a a a"]})
        config = DPOConfig(beta=BETA, precompute_ref_log_probs=True, **common)
        trainer = DPOTrainer(peer, args=config, train_dataset=text, processing_class=tokenizer)
        length = [len(row) - start for row, start in zip(ids, starts, strict=True)]
        summed = [part.sum().item() for part in stored(name, model, pairs)[1].split(length)]
        keys = ("prompt_ids", "chosen_ids", "rejected_ids")
        examples = [dict(zip(keys, pair, strict=True)) for pair in pairs[:4]]
        for i, example in enumerate(examples):
            example |= {"ref_chosen_logps": summed[2 * i], "ref_rejected_logps": summed[2 * i + 1]}
    else:
        labels = [[-100] * start + row[start:] for row, start in zip(ids, starts, strict=True)]
        examples = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
        config = SFTConfig(padding_free=free, **common)
        data = datasets.Dataset.from_list(examples)
        trainer = SFTTrainer(peer, args=config, train_dataset=data, processing_class=tokenizer)
    peer.train()  # as its training_step does; the model has no dropout
    batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in trainer.data_collator(examples).items()}
    return lambda: trainer.compute_loss(peer, dict(batch))


def sharing(model: Any) -> Any:
    """A model of its own configuration and forward, with the same parameters and gradients, attending by sdpa."""
    other = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    other.set_attn_implementation("sdpa")
    return other


def build(name: str, model: Any, pairs: list[Pair]) -> Step:
    return (trl if "TRL" in name else padded if "padded" in name else ours)(name, model, pairs)


class Runner:
    """Runs a step on fresh gradients, as a training loop would. AdamW's rate is 0, so that the weights stay."""

    def __init__(self, model: Any, options: argparse.Namespace) -> None:
        self.parameters, self.device = list(model.parameters()), options.device
        self.clock = {"wall": time.perf_counter, "cpu": time.process_time}[options.clock]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, fused=True) if options.optimizer else None

    def __call__(self, step: Step) -> tuple[float, Tensor]:
        """Seconds and the loss; the gradients stay until the next call."""
        self.clear()
        begin = self.clock()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss = step()
        loss.backward()
        if self.optimizer:
            self.optimizer.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return self.clock() - begin, loss.detach()

    def clear(self) -> None:
        for p in self.parameters:
            p.grad = None
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def gradient(self) -> list[Tensor]:
        return [p.grad.double() for p in self.parameters if p.grad is not None]


def peak_memory(name: str, pairs: list[Pair], options: argparse.Namespace) -> list[float]:
    """MiB that a step adds at its peak, twice; in a forked process, before this one computes anything."""

    def child(sender: Any) -> None:
        quiet(options)
        model = load(options)
        run, step, found = Runner(model, options), build(name, model, pairs), []
        run(step)
        for _ in range(2):
            run.clear()
            if options.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                run(step)
                found.append((torch.cuda.max_memory_allocated() - before) / 2**20)
            else:
                ctypes.CDLL("libc.so.6").malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident now
                before = status("VmRSS")
                run(step)
                found.append(status("VmHWM") - before)
        sender.send(found)

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender,))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        raise SystemExit(f"{name}: the process that measures its memory ended with an error") from None
    process.join()
    return found


def status(key: str) -> float:
    """MiB, of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 2**10


def quiet(options: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    if options.threads:
        torch.set_num_threads(options.threads)


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """The median and its 95% bootstrap interval."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[50], medians[1949]


def measure(limit: int, pairs: list[Pair], memory: dict[str, list[float]], model: Any, options: Any) -> list[str]:
    """Print the tables of one batch; returns the floors missed."""
    run, names, missed = Runner(model, options), list(memory), []
    steps = {name: build(name, model, pairs) for name in names}
    losses: dict[str, float] = {}
    agreement: dict[tuple[str, str], str] = {}
    for name in [n for n in names if n in ("SFT", "VAR", "DPO")]:
        losses[name] = run(steps[name])[1].item()
        own = run.gradient()
        norm = sum(g.square().sum() for g in own).sqrt().item()
        for _, peer, same in (c for c in COMPARED if c[0] == name and c[2] and c[1] in names):
            losses[peer] = run(steps[peer])[1].item()
            other = run.gradient()
            other_norm = sum(g.square().sum() for g in other).sqrt().item()
            apart = sum((a - b).square().sum() for a, b in zip(own, other, strict=True)).sqrt().item()
            agreement[name, peer] = (
                f"{abs(losses[name] - losses[peer]):.1e} | {abs(norm - other_norm) / norm:.1e} | {apart / norm:.1e}"
            )
    own = other = []
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(options.rounds):  # every step has run once, for the agreement above: that was the warm-up
        for name in names if i % 2 else reversed(names):
            seconds[name].append(run(steps[name])[0])

    print(f"\n### Longest {limit}\n")
    for kind in ("SFT", "DPO"):
        ids, starts = sequences(kind, pairs)
        real, lengths = sum(map(len, ids)), ", ".join(f"{s}+{len(r) - s}" for r, s in zip(ids, starts, strict=True))
        what = "SFT, VAR" if kind == "SFT" else kind
        print(
            f"- {what}: 8 sequences, {real} tokens, padded/real {padding(ids):.2f}, response/real "
            f"{1 - sum(starts) / real:.2f}; prompt+response {lengths}"
        )
    print("\n| step | loss | median s | real tokens/s | peak memory, MiB |\n| --- | --- | --- | --- | --- |")
    for name in names:
        median, real = statistics.median(seconds[name]), sum(map(len, sequences(name, pairs)[0]))
        print(f"| {name} | {losses[name]:.6f} | {median:.3f} | {real / median:.0f} | {max(memory[name]):.0f} |")
    print(
        "\n| ours beside | speed, ours/theirs [95%] | peak memory, ours/theirs | loss, abs. diff. | gradient norm, rel. "
        "diff. | gradients, ‖g−g′‖/‖g‖ |\n| --- | --- | --- | --- | --- | --- |"
    )
    for mine, peer, _ in COMPARED:
        if peer not in names:
            continue
        ratio, low, high = interval([b / a for a, b in zip(seconds[mine], seconds[peer], strict=True)])
        least, most = min(memory[mine]) / max(memory[peer]), max(memory[mine]) / min(memory[peer])
        middle = statistics.median(memory[mine]) / statistics.median(memory[peer])
        print(
            f"| {mine}, {peer} | {ratio:.3f} [{low:.3f}, {high:.3f}] | {middle:.3f} [{least:.3f}, {most:.3f}] | "
            f"{agreement.get((mine, peer), '– | – | –')} |",
            flush=True,
        )
        if high < FLOORS.get((mine, peer), 0):
            missed.append(f"longest {limit}: {mine} at {ratio:.3f} × {peer}'s speed, floor {FLOORS[mine, peer]}")
        if least > MEMORY_CEILING.get((mine, peer), float("inf")):
            missed.append(f"longest {limit}: {mine} takes {middle:.3f} × {peer}'s memory")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of HHA files; without it random tokens in HHA's lengths")
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a hub id or a folder")
    parser.add_argument("--tiny", action="store_true", help="a random model of 2 layers: checks this script")
    parser.add_argument("--cache", default="~/.cache/var-align", help="where the default model is unpacked")
    parser.add_argument("--longest", type=int, nargs="+", default=[512, 256])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--optimizer", action="store_true", help="AdamW (fused) is part of the step")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; its own choice where not given")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: seconds of all threads together")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=STEPS, metavar="STEP")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a floor is missed")
    options = parser.parse_args()
    quiet(options)
    names, batches = options.steps, read(options)
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed (pip install -e '.[peer]'): its steps are left out\n")
        names = [n for n in names if "TRL" not in n]
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers"))
    versions += f", trl {importlib.metadata.version('trl')}" if any("TRL" in n for n in names) else ""
    memory = {limit: {name: peak_memory(name, pairs, options) for name in names} for limit, pairs in batches.items()}
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{'tiny' if options.tiny else options.model}, {device}, {'bf16 autocast' if options.device == 'cuda' else 'fp32'}, "
        f"{'with' if options.optimizer else 'without'} AdamW, {options.rounds} rounds; {versions}"
    )
    model, missed = load(options), []
    for limit, pairs in batches.items():
        missed += measure(limit, pairs, memory[limit], model, options)
    if options.check:
        print("\n" + ("\n".join(f"MISSED {m}" for m in missed) or "every floor is held"))
        sys.exit(bool(missed))


if __name__ == "__main__":
    main()
