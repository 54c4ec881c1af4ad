"""Measure every target of the benchmarks: training steps, memory at a large vocabulary, and complete processes.

    python experiments/benchmarks/step.py --data <folder of HHA files> --check

**Steps** (listed in steps.py). A step is forward and backward on a batch in memory, without data loading and logging,
and with AdamW's fused update if --optimizer is given. Ours is `AlignmentModule.training_step`, and `cross_logps` for
cross scoring. The padded step pads on the right and computes full logits, log_softmax and gather. TRL's step is its
trainer's own collator and `compute_loss`, with completion-only labels, and with precomputed reference log-probabilities
for DPO. All models of a run share one set of parameters, and tokens and response masks are the same.

With --data a batch has HHA dialogues no longer than the limit. It is the most typical of 1,001 random batches in
padding, fraction of response tokens and longest sequence. Without --data, tokens are random, with the lengths of that
batch.

Rounds are interleaved: each runs every step once, alternately in order and in reverse. Ratios are computed within a
round, and their median is printed with its 95% bootstrap interval over rounds. Peak memory is what a step adds to the
process that holds the model, gradients included. It is measured in a separate forked process per step, twice for ours,
after a warm-up on short sequences. A target of --check is missed if the complete interval misses it. Precision is bf16
autocast on CUDA and fp32 on a CPU.

TFLOP/s is the arithmetic of our step (a forward, and twice that for the backward, without padding and recomputation)
divided by the time. Divided by the device's peak (--peak-tflops), it is MFU. "by arithmetic" is the ratio of all FLOPs
computed, theirs over ours, which is the speedup at equal FLOP/s.

**Vocabulary.** A random model of 4 layers with the widths and the 151,936 tokens of Qwen2.5-0.5B. The peak of a step is
compared with the sum of gradients, one chunk of logits and activations, and with the same step with full logits.

**Processes** are in processes.py.
"""

import argparse
import importlib.metadata
import importlib.util
import statistics
import sys
from typing import Any

import processes
import torch
from measure import Runner, bootstrap_median, run_forked
from steps import (
    OURS,
    PEERS,
    STEPS,
    Pair,
    Rows,
    count_bytes,
    count_flops,
    count_step_flops,
    get_work,
    load_model,
    make_full_logits,
    make_llama,
    make_ours,
    make_step,
    read_batches,
)  # fmt: skip

SPEED = {  # the least ratio of ours over theirs. Those with TRL are for a CPU only
    ("VAR", "SFT"): 0.98,
    ("SFT", "TRL SFT"): 2.5, ("SFT", "TRL padding_free SFT"): 2.0,
    ("VAR", "TRL SFT"): 2.5, ("VAR", "TRL padding_free SFT"): 2.0,
    ("DPO", "TRL DPO"): 2.5,
    ("cross", "padded cross"): 5.0, ("cross", "packed cross"): 2.5,
}  # fmt: skip
MEMORY = {("VAR", "SFT"): 1.0}  # the largest ratio of ours over theirs
SAME = 1e-5  # the largest difference from TRL in fp32, of losses, and relative of gradient norms
PARTS = ["steps", "vocabulary", "processes"]
VOCABULARY = 151_936
QWEN = {
    "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2,
    "num_hidden_layers": 4,
}  # fmt: skip


def measure_peak(name: str, pairs: list[Pair], options: argparse.Namespace) -> list[float]:
    """Return MiB that a step adds at its peak, twice for ours. Call it in a fresh process."""
    run = Runner(model := load_model(options), options)
    run(make_step(name, model, [(p[:8], c[:8], r[:8]) for p, c, r in pairs]))
    step = make_step(name, model, pairs)
    return [run.memory(step) for _ in range(2 if name in OURS else 1)]


def measure_vocabulary(full: bool, options: argparse.Namespace) -> tuple[float, dict[str, float], float]:
    """Return MiB of an SFT step of 4 sequences of 64 + 256 tokens: its peak, the bound's parts, and a tensor [N, V].

    Call it in a fresh process.
    """
    vocabulary, answer = (20_000, 64) if options.tiny else (VOCABULARY, 256)
    model = make_llama(options, vocab_size=vocabulary, **QWEN)
    run, make = Runner(model, options), make_full_logits if full else make_ours
    short, pairs = ([([n] * 64, [*range(count)], list[int]()) for n in range(4)] for count in (8, answer))
    run(make(model, Rows("SFT", short).annotate(model)))
    rows = Rows("SFT", pairs).annotate(model)
    parts = {name: size / 2**20 for name, size in count_bytes(model, rows.encoded()).items()}
    return run.memory(make(model, rows)), parts, 4 * sum(rows.answers) * vocabulary / 2**20


def print_vocabulary(found: list[Any], options: argparse.Namespace) -> list[str]:
    """Print the table of `measure_vocabulary`, ours and with full logits. Return the targets missed."""
    (peak, parts, tensor), (full, _, _) = found
    bound = sum(parts.values())
    print(f"\n### Memory of a step at a vocabulary of {20_000 if options.tiny else VOCABULARY:,}, MiB\n")
    print("| ours | bound | ours/bound | one [N, V] | with full logits | full/ours |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(f"| {peak:.0f} | {bound:.0f}: {', '.join(f'{name} {size:.0f}' for name, size in parts.items())} ", end="")
    print(f"| {peak / bound:.2f} | {tensor:.0f} | {full:.0f} | {full / peak:.2f} |", flush=True)
    missed = f"memory at a large vocabulary: {peak:.0f} MiB, bound {bound:.0f}"
    return [missed] if peak > bound and options.device == "cpu" else []  # counted in fp32


def print_speeds(limit: int, pairs: list[Pair], memory: dict[str, list[float]], model: Any, options: Any) -> list[str]:
    """Measure one batch and print its tables. Return the targets missed."""
    run, names, missed, agreement, losses = Runner(model, options), list(memory), [], {}, {}
    steps = {name: make_step(name, model, pairs) for name in names}
    own = other = torch.empty(0)
    for mine in [name for name in names if name in OURS]:
        losses[mine], own = run(steps[mine])[1], run.outcome()
        for peer in [name for name in PEERS[mine] if name in names]:
            losses[peer], other = run(steps[peer])[1], run.outcome()
            norm, distance = own.norm().item(), (own - other).norm().item()
            gap, norms = abs(losses[mine] - losses[peer]), abs(other.norm().item() / norm - 1)
            agreement[mine, peer] = f"{gap:.1e} | {norms:.1e} | {distance / norm:.1e}"
            if "TRL" in peer and not run.cuda and max(gap, norms) > SAME:
                missed.append(f"{limit}: {mine} and {peer} differ by {gap:.1e} in loss, {norms:.1e} in gradient norm")
    for name in names:
        if name not in losses:  # a peer whose own step is not chosen
            losses[name] = run(steps[name])[1]
    del own, other
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(options.rounds):  # the runs for the agreement above were the warm-up
        for name in names if i % 2 else reversed(names):
            seconds[name].append(run(steps[name])[0])

    print(f"\n### No longer than {limit}\n")
    for kinds in (("SFT", "VAR", "cross"), ("DPO",), ("group",)):
        if {get_work(name) for name in names} & set(kinds):
            rows = Rows(kinds[0], pairs)
            lengths = ", ".join(f"{start}+{n}" for start, n in zip(rows.starts, rows.answers, strict=True))
            print(f"- {', '.join(kinds)}: 8 sequences, {rows.real} tokens; padded/real {rows.padding:.2f},")
            print(f"  response/real {rows.response:.2f}; prompt+response {lengths}")
    print("\n| step | loss, or mean of the table | median s | real tokens/s | TFLOP/s | MFU | peak memory, MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in names:
        median, rows = statistics.median(seconds[name]), Rows(name, pairs)
        work = sum(count_flops(model, rows.encoded()).values()) * (1 if rows.work == "cross" else 3) / median / 1e12
        mfu = f"{work / options.peak_tflops:.3f}" if options.peak_tflops else "–"
        print(f"| {name} | {losses[name]:.6f} | {median:.3f} | {rows.real / median:.0f} ", end="")
        print(f"| {work:.3f} | {mfu} | {max(memory[name]):.0f} |")
    print("\n| ours, theirs | speed, ours/theirs [95%] | target | by arithmetic | memory, ours/theirs [range] ", end="")
    print("| loss, abs. diff. | gradient norm, rel. diff. | gradients, ‖g−g′‖/‖g‖ |", f"\n|{' --- |' * 8}")
    for mine, peer in dict.fromkeys([*agreement, *SPEED]):
        if mine in names and peer in names:
            ratio, low, high = bootstrap_median([b / a for a, b in zip(seconds[mine], seconds[peer], strict=True)])
            least, most = min(memory[mine]) / max(memory[peer]), max(memory[mine]) / min(memory[peer])
            middle = statistics.median(memory[mine]) / statistics.median(memory[peer])
            floor = 0.0 if run.cuda and "TRL" in peer else SPEED.get((mine, peer), 0.0)
            ceiling = MEMORY.get((mine, peer), float("inf"))
            print(f"| {mine}, {peer} | {ratio:.3f} [{low:.3f}, {high:.3f}] | {f'≥ {floor}' if floor else '–'} ", end="")
            print(f"| {count_step_flops(model, peer, pairs) / count_step_flops(model, mine, pairs):.3f} ", end="")
            print(f"| {middle:.3f} [{least:.3f}, {most:.3f}] | {agreement.get((mine, peer), '– | – | –')} |")
            if high < floor:
                missed.append(f"{limit}: {mine} at {ratio:.3f} × {peer}'s speed, target at least {floor}")
            if least > ceiling:
                missed.append(f"{limit}: {mine} takes {middle:.3f} × {peer}'s memory, target at most {ceiling}")
    print(end="", flush=True)
    return missed


def main() -> None:
    """Measure the chosen parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of HHA files. Default: random tokens in HHA's lengths")
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a hub id or a folder")
    parser.add_argument("--tiny", action="store_true", help="random models of 2 layers, to check these scripts")
    parser.add_argument("--cache", default="~/.cache/var-align", help="where the default model is unpacked")
    parser.add_argument("--longest", type=int, nargs="+", default=[512, 256])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--optimizer", action="store_true", help="include AdamW (fused) in the step")
    parser.add_argument("--threads", type=int, help="of torch on the CPU. Default: torch's own choice")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu sums the seconds of all threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--peak-tflops", type=float, help="peak of the device in the run's precision, for MFU")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=STEPS, metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    options = parser.parse_args()
    names, versions = options.steps, ["torch", "transformers", "lightning"]
    if importlib.util.find_spec("trl"):
        if options.device == "cpu":  # import once. On CUDA the import might start the driver before the fork
            from trl import DPOTrainer, SFTTrainer  # noqa: F401

        versions.append("trl")
    else:
        print("TRL is not installed (pip install -e '.[peer]'): its steps are skipped\n")
        names = [name for name in names if "TRL" not in name]
    batches = read_batches(options) if "steps" in options.parts else {}
    # fork first, because a process whose threads have computed must not fork
    wide = (
        [run_forked(measure_vocabulary, full, options) for full in (False, True)]
        if "vocabulary" in options.parts
        else []
    )
    memory = {
        limit: {name: run_forked(measure_peak, name, pairs, options) for name in names}
        for limit, pairs in batches.items()
    }
    device = f"{torch.cuda.get_device_name()}, bf16" if options.device == "cuda" else "CPU, fp32"
    threads = options.threads or torch.get_num_threads()
    print(
        f"{'tiny' if options.tiny else options.model}; {device}, {threads} CPU threads; {options.clock} clock, ", end=""
    )
    print(f"{options.rounds} rounds, {'with' if options.optimizer else 'without'} AdamW; ", end="")
    print(", ".join(f"{package} {importlib.metadata.version(package)}" for package in versions), flush=True)
    missed = print_vocabulary(wide, options) if wide else []
    if batches:
        model = load_model(options)
        missed += [
            m for limit, pairs in batches.items() for m in print_speeds(limit, pairs, memory[limit], model, options)
        ]
        del model
    if "processes" in options.parts:
        missed += processes.measure(options)
    if options.check:
        print("\n" + ("\n".join(f"MISSED {m}" for m in missed) or "all targets are met"))
        sys.exit(bool(missed))


if __name__ == "__main__":
    main()
