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
that holds the model, gradients included (on a CPU resident memory, Linux only; on CUDA what torch allocates): each step
in a forked process of its own, ours twice, after a warm-up on short sequences. A floor of --check is missed where the
whole interval lies beyond it. On CUDA everything runs in bf16 autocast, on a CPU in fp32.
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

from var.data.sources.hha import HHA
from var.estimators import Global
from var.losses.dpo import DPO
from var.losses.sft import SFT
from var.losses.var import VAR
from var.module import AlignmentModule, Schedule
from var.packing import pack
from var.policy import Policy
from var.pretrained import Pretrained

OURS = {"SFT": SFT(), "VAR": VAR(estimator=Global()), "DPO": DPO(beta=0.1)}
STEPS = [*OURS, "padded SFT", "padded VAR", "padded DPO", "TRL SFT", "TRL SFT padding_free", "TRL DPO"]
FLOORS = {("VAR", "SFT"): 0.98, ("VAR", "TRL SFT"): 1.8, ("VAR", "TRL SFT padding_free"): 1.5}  # speed
CEILING = {("VAR", "SFT"): 1.0}  # memory
LENGTHS = {  # prompt, chosen and rejected answer, in the batches that --data picks
    512: "39 124 13, 215 21 117, 185 30 66, 115 72 3, 324 20 15, 89 48 44, 96 60 63, 49 17 32",
    256: "104 32 32, 37 15 13, 180 46 57, 40 145 68, 130 7 10, 134 39 12, 139 34 28, 35 19 11",
}
Pair = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected
Step = Callable[[], Tensor]


class Rows:
    """The sequences of a step, and what the data brings: weights [8] of mean 1, reference log-probabilities near the
    policy's, [N] and summed [8]. Better and worse answers alternate for DPO."""

    def __init__(self, name: str, pairs: list[Pair]) -> None:
        self.paired = "DPO" in name
        rows = [(p, a) for p, c, r in pairs[:4] for a in (c, r)] if self.paired else [(p, c) for p, c, _ in pairs]
        self.ids, self.starts = [p + a for p, a in rows], [len(p) for p, _ in rows]
        self.answers = [len(a) for _, a in rows]
        self.real, self.longest = sum(map(len, self.ids)), max(map(len, self.ids))
        self.padding, self.response = len(rows) * self.longest / self.real, sum(self.answers) / self.real

    def store(self, model: Any) -> "Rows":
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(8, generator=generator).exp()
        self.weights = (weights / weights.mean()).to(model.device)
        self.reference = self.summed = None
        if self.paired:
            with torch.no_grad():
                logps = Policy(model)(pack(self.ids, self.starts).to(model.device))
            self.reference = logps + 0.3 * torch.randn(len(logps), generator=generator).to(logps)
            self.summed = torch.stack([part.sum() for part in self.reference.split(self.answers)])
        return self


def read(options: argparse.Namespace) -> dict[int, list[Pair]]:
    """longest → 8 pairs."""
    rng = random.Random(0)
    if options.data is None:
        draw = lambda n: rng.choices(range(100, 40_000), k=int(n))  # noqa: E731
        return {n: [tuple(map(draw, row.split())) for row in LENGTHS[n].split(",")] for n in options.longest}
    chat, source, rows = pretrained(options).chat, HHA(folder=options.data, subsets=("helpful_base",)), list[Pair]()
    for where, record in source.records():
        if row := source.row(where, record):
            better, worse = (chat.encode(row.prompt, response.text) for response in row.responses)
            rows.append((better.ids[: better.start], better.ids[better.start :], worse.ids[worse.start :]))
    batches = {}
    for limit in options.longest:
        short = [pair for pair in rows if len(pair[0]) + max(len(pair[1]), len(pair[2])) <= limit]
        drawn = [rng.sample(short, 8) for _ in range(1001)]
        shapes = [(r.padding, r.response, r.longest) for r in (Rows("SFT", pairs) for pairs in drawn)]
        middle = [statistics.median(column) for column in zip(*shapes, strict=True)]
        far = [sum(abs(x / m - 1) for x, m in zip(shape, middle, strict=True)) for shape in shapes]
        batches[limit] = drawn[far.index(min(far))]
    return batches


def pretrained(options: argparse.Namespace) -> Pretrained:
    path = "HuggingFaceTB/SmolLM2-135M-Instruct" if options.model == "smollm2-135m" else options.model
    plain = dict.fromkeys(("revision", "chat_template")) | dict.fromkeys(
        ("trust_remote_code", "gradient_checkpointing"), False
    )
    cache = os.path.expanduser(options.cache)
    kind = {"name": "smollm2-135m", "path": path, "dtype": "float32", "attention": "packed", "cache": cache}
    return Pretrained(architecture={}, **kind, **plain)


def load(options: argparse.Namespace) -> Any:
    warnings.filterwarnings("ignore")
    if options.threads:
        torch.set_num_threads(options.threads)
    if not options.tiny:
        return pretrained(options).load().to(options.device)
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=49152, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    config._attn_implementation = "packed"
    return LlamaForCausalLM(config).eval().to(options.device)


def build(name: str, model: Any, pairs: list[Pair]) -> Step:
    rows = Rows(name, pairs).store(model)
    if name in OURS:
        return ours(OURS[name], model, rows)
    other = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # its parameters and gradients are the same
    other.set_attn_implementation("sdpa")
    return trl(name, other, rows) if "TRL" in name else padded(name, other, rows)


def ours(loss: Any, model: Any, rows: Rows) -> Step:
    divisors = {"global_tokens": float(sum(rows.answers)), "global_sequences": 8.0}
    batch = pack(rows.ids, rows.starts, weights=rows.weights, reference_logps=rows.reference, **divisors)
    batch = batch.to(model.device)
    schedule = Schedule(kind="constant", warmup=0.0, floor=0.0)
    module = AlignmentModule(Policy(model), loss, torch.optim.AdamW, schedule)
    module._trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=1)  # all that training_step asks of it
    return lambda: module.training_step(batch, 0)


def padded(name: str, model: Any, rows: Rows) -> Step:
    """The step most code takes: [B, L, V] logits, log_softmax, gather, mask."""
    tokens, attended, mask = torch.zeros(3, 8, rows.longest, dtype=torch.long)
    for i, (row, start) in enumerate(zip(rows.ids, rows.starts, strict=True)):
        tokens[i, : len(row)], attended[i, : len(row)], mask[i, start : len(row)] = torch.tensor(row), 1, 1
    tokens, attended, mask = (x.to(model.device) for x in (tokens, attended, mask))

    def step() -> Tensor:
        logits = model(input_ids=tokens, attention_mask=attended, use_cache=False).logits
        logps = logits[:, :-1].float().log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
        summed = (logps * mask[:, 1:]).sum(1)
        if rows.paired:
            ratio = summed - rows.summed
            return -torch.nn.functional.logsigmoid(0.1 * (ratio[0::2] - ratio[1::2])).mean()
        return -(summed * rows.weights if "VAR" in name else summed).sum() / mask.sum()

    return step


def trl(name: str, model: Any, rows: Rows) -> Step:
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[EOS]": 1}, unk_token="[PAD]"))  # the tokens come ready
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]")
    common = {"output_dir": tempfile.mkdtemp(), "report_to": "none", "per_device_train_batch_size": 8, "bf16": False}
    common |= {"use_cpu": model.device.type == "cpu", "gradient_checkpointing": False, "max_length": None}
    split = [(row[:start], row[start:]) for row, start in zip(rows.ids, rows.starts, strict=True)]
    if rows.paired:
        text = datasets.Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})  # asked for, not used
        config = DPOConfig(beta=0.1, precompute_ref_log_probs=True, **common)
        trainer = DPOTrainer(model, args=config, train_dataset=text, processing_class=tokenizer)
        keys = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
        better, worse, logps = split[0::2], split[1::2], rows.summed.view(4, 2).tolist()
        examples = [(*b, w[1], *r) for b, w, r in zip(better, worse, logps, strict=True)]
        examples = [dict(zip(keys, example, strict=True)) for example in examples]
    else:
        examples = [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a in split]
        config = SFTConfig(padding_free="padding_free" in name, **common)
        data = datasets.Dataset.from_list(examples)
        trainer = SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
    model.train()  # as its training_step does; there is no dropout
    batch = trainer.data_collator(examples)
    batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return lambda: trainer.compute_loss(model, dict(batch))


class Runner:
    """Runs a step on fresh gradients, as a training loop would. AdamW's rate is 0, so that the weights stay."""

    def __init__(self, model: Any, options: argparse.Namespace) -> None:
        self.parameters, self.cuda = list(model.parameters()), options.device == "cuda"
        self.clock = {"wall": time.perf_counter, "cpu": time.process_time}[options.clock]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, fused=True) if options.optimizer else None

    def __call__(self, step: Step) -> tuple[float, float]:
        """Seconds and the loss; the gradients stay until the next call."""
        self.clear()
        begin = self.clock()
        with torch.autocast("cuda", torch.bfloat16, enabled=self.cuda):
            loss = step()
        loss.backward()
        if self.optimizer:
            self.optimizer.step()
        if self.cuda:
            torch.cuda.synchronize()
        return self.clock() - begin, loss.item()

    def clear(self) -> None:
        for p in self.parameters:
            p.grad = None
        gc.collect()

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.parameters])


def peak_memory(name: str, pairs: list[Pair], options: argparse.Namespace) -> list[float]:
    """MiB that a step adds at its peak, ours twice. To be called in a fresh process."""
    run, found = Runner(model := load(options), options), []
    run(build(name, model, [(p[:8], c[:8], r[:8]) for p, c, r in pairs]))
    step = build(name, model, pairs)
    for _ in range(2 if name in OURS else 1):
        run.clear()
        if run.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident now
        before = torch.cuda.memory_allocated() / 2**20 if run.cuda else resident("VmRSS")
        run(step)
        found.append((torch.cuda.max_memory_allocated() / 2**20 if run.cuda else resident("VmHWM")) - before)
    return found


def resident(key: str) -> float:
    """MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 2**10


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """The median and its 95% bootstrap interval."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[50], medians[1949]


def measure(limit: int, pairs: list[Pair], memory: dict[str, list[float]], model: Any, options: Any) -> list[str]:
    """Print the tables of one batch; returns the floors missed."""
    run, names, missed, agreement, losses = Runner(model, options), list(memory), [], {}, {}
    steps = {name: build(name, model, pairs) for name in names}
    own = other = torch.empty(0)
    for mine in [name for name in names if name in OURS]:
        losses[mine], own = run(steps[mine])[1], run.gradient()
        for peer in [name for name in names if name not in OURS and mine in name]:
            losses[peer], other = run(steps[peer])[1], run.gradient()
            norm, apart = own.norm().item(), (own - other).norm().item()
            gap = abs(losses[mine] - losses[peer])
            agreement[mine, peer] = f"{gap:.1e} | {abs(other.norm().item() / norm - 1):.1e} | {apart / norm:.1e}"
    del own, other
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(options.rounds):  # every step has run once, for the agreement above: that was the warm-up
        for name in names if i % 2 else reversed(names):
            seconds[name].append(run(steps[name])[0])

    print(f"\n### No longer than {limit}\n")
    for kind in ("SFT", "DPO"):
        rows = Rows(kind, pairs)
        lengths = ", ".join(f"{start}+{n}" for start, n in zip(rows.starts, rows.answers, strict=True))
        print(f"- {kind}{', VAR' * (kind == 'SFT')}: 8 sequences, {rows.real} tokens; padded/real {rows.padding:.2f},")
        print(f"  response/real {rows.response:.2f}; prompt+response {lengths}")
    print("\n| step | loss | median s | real tokens/s | peak memory, MiB |\n| --- | --- | --- | --- | --- |")
    for name in names:
        median, real = statistics.median(seconds[name]), Rows(name, pairs).real
        print(f"| {name} | {losses[name]:.6f} | {median:.3f} | {real / median:.0f} | {max(memory[name]):.0f} |")
    print("\n| ours, theirs | speed, ours/theirs [95%] | memory, ours/theirs [range] | loss, abs. diff. ", end="")
    print("| gradient norm, rel. diff. | gradients, ‖g−g′‖/‖g‖ |\n| --- | --- | --- | --- | --- | --- |")
    for mine, peer in dict.fromkeys([*agreement, *FLOORS]):
        if mine in names and peer in names:
            ratio, low, high = interval([b / a for a, b in zip(seconds[mine], seconds[peer], strict=True)])
            least, most = min(memory[mine]) / max(memory[peer]), max(memory[mine]) / min(memory[peer])
            middle = statistics.median(memory[mine]) / statistics.median(memory[peer])
            print(f"| {mine}, {peer} | {ratio:.3f} [{low:.3f}, {high:.3f}] ", end="")
            print(f"| {middle:.3f} [{least:.3f}, {most:.3f}] | {agreement.get((mine, peer), '– | – | –')} |")
            if high < FLOORS.get((mine, peer), 0):
                missed.append(f"{limit}: {mine} at {ratio:.3f} × {peer}'s speed, floor {FLOORS[mine, peer]}")
            if least > CEILING.get((mine, peer), float("inf")):
                missed.append(f"{limit}: {mine} takes {middle:.3f} × {peer}'s memory, ceiling {CEILING[mine, peer]}")
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
    names, versions = options.steps, ["torch", "transformers"]
    if importlib.util.find_spec("trl"):
        versions.append("trl")
    else:
        print("TRL is not installed (pip install -e '.[peer]'): its steps are left out\n")
        names = [name for name in names if "TRL" not in name]
    batches = read(options)
    memory: dict[int, dict[str, list[float]]] = {limit: {} for limit in batches}
    for limit, pairs in batches.items():  # forked before this process computes anything
        for name in names:
            with multiprocessing.get_context("fork").Pool(1) as pool:
                memory[limit][name] = pool.apply(peak_memory, (name, pairs, options))
    model = load(options)
    device = f"{torch.cuda.get_device_name()}, bf16" if options.device == "cuda" else "CPU, fp32"
    print(f"{'tiny' if options.tiny else options.model}; {device}, {torch.get_num_threads()} CPU threads; ", end="")
    print(
        f"{options.clock} clock, {options.rounds} rounds, {'with' if options.optimizer else 'without'} AdamW; ", end=""
    )
    print(", ".join(f"{package} {importlib.metadata.version(package)}" for package in versions), flush=True)
    missed = [m for limit, pairs in batches.items() for m in measure(limit, pairs, memory[limit], model, options)]
    if options.check:
        print("\n" + ("\n".join(f"MISSED {m}" for m in missed) or "every floor is held"))
        sys.exit(bool(missed))


if __name__ == "__main__":
    main()
