"""Run the gpu tests and five short training runs on this device, and compare the speed of steps with TRL's.

    python experiments/gpu/runs.py <folder> [--dry]

The model is a Qwen2.5-0.5B with random weights and a tokenizer of bytes, so that nothing is downloaded. With --dry it
is tiny, and everything also runs on a CPU.
"""

import argparse
import csv
import importlib.util
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch
from checks import CUDA, DEVICE, make_model
from findings import Findings

from notebooks.tiny import byte_tokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "experiments" / "benchmarks"))
PEAKS = {
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
}
"""FLOP/s of dense bf16 matrices, from the vendors' data sheets."""

TRAIN = """
import runpy, sys, torch, var.models.attention
torch.backends.cuda.enable_cudnn_sdp(sys.argv.pop(1) == "cudnn")
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""
GRPO = ["loss=grpo", "data=arithmetic", "data.source.problems=64", "reward=near_number", "generate.responses=4",
        "generate.max_new_tokens=32", "data.micro_batch=8", "data.global_batch=8", "trainer.max_steps=4"]  # fmt: skip
RUNS = {  # cuDNN's attention, and overrides
    "DPO, packed": ("cudnn", ["loss=dpo", "model.attention=packed"]),
    "DPO, packed without cuDNN": ("", ["loss=dpo", "model.attention=packed"]),
    "DPO, varlen": ("", ["loss=dpo", "model.attention=varlen"]),
    "KTO": ("", ["loss=kto"]),
    "GRPO": ("", GRPO),
}


def check_tests(found: Findings, item: str, dry: bool) -> None:
    """Run the tests that need a CUDA device."""
    if importlib.util.find_spec("pytest") is None:
        found.add(item, "gpu tests", "pytest is not installed", "", "passed", False)
        return
    files = [str(p) for p in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in p.read_text()]
    report = found.path.parent / "gpu_tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", *files]
    subprocess.run(command, cwd=ROOT, check=False, timeout=300)
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case.get("name") for case in cases if {child.tag for child in case} & {"failure", "error"}]
    passed = sum(not list(case) or {child.tag for child in case} <= {"system-out", "system-err"} for case in cases)
    value = f"{passed} passed, {len(failed)} failed, {len(cases) - passed - len(failed)} skipped"
    ok = not failed and bool(passed) if CUDA else None
    found.add(item, "gpu tests", "; ".join([value, *map(str, failed)]), "", "all passed", ok)


def write_rows(path: Path, dry: bool) -> Path:
    """Write prompts with two scored responses of random words; a byte is a token."""
    draw = random.Random(0)
    size, rows = (20, 24) if dry else (400, 400)

    def text() -> str:
        return "".join(draw.choices("abcdefgh ", k=draw.randint(size // 2, size))) + "."

    def responses() -> list[dict[str, Any]]:
        return [{"text": text(), "score": draw.gauss(0, 1)} for _ in range(2)]

    records = [{"id": str(i), "prompt": f"{i}: {text()}", "responses": responses()} for i in range(rows)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def check_runs(found: Findings, item: str, dry: bool) -> None:
    """Train five short runs by train.py, and compare their speed and first loss."""
    folder = found.path.parent.absolute()
    model = make_model(dry)
    parameters = sum(p.numel() for p in model.parameters())
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    del model
    rows = write_rows(folder / "rows.jsonl", dry)
    common = [
        f"model.path={folder}/model", "model.name=check", "data.validation_prompts=0", f"cache={folder}/cache",
        f"annotation_cache={folder}/annotations", "resume=false", "trainer.log_every_n_steps=1",
    ]  # fmt: skip
    offline = ["data=files", f"data.path={rows}", "reward=score", f"trainer.max_steps={3 if dry else 20}"]
    speeds, losses = dict[str, float](), dict[str, float]()
    for number, (name, (cudnn, options)) in enumerate(RUNS.items()):
        if "varlen" in name and not CUDA:
            found.add(item, f"{name}: seconds", None, "s", "needs CUDA", None)
            continue
        runs = folder / "runs" / str(number)
        chosen = options if name == "GRPO" else [*offline, *options]
        command = [sys.executable, "-c", TRAIN, cudnn, *common, *chosen, f"runs={runs}"]
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, check=False, timeout=180, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        if done.returncode:
            last = (done.stderr.strip() or done.stdout).splitlines()[-1:]
            found.add(item, f"{name}: finishes", f"{last}", "", "exit status 0", False)
            continue
        found.add(item, f"{name}: finishes", seconds, "s, with start and export", "exit status 0", True)
        (run,) = runs.iterdir()
        speeds[name] = json.loads((run / "summary.json").read_text())["tokens_per_second"]
        with (run / "metrics.csv").open(newline="") as file:
            curve = list(csv.DictReader(file))
        losses[name] = next(float(row["train/loss"]) for row in curve if row.get("train/loss"))
        found.add(item, f"{name}: speed", speeds[name], "tokens per second", "see the ratios", None)
        peaks = [float(row[PEAK_MEMORY]) for row in curve if row.get(PEAK_MEMORY)]
        found.add(item, f"{name}: peak memory of training", max(peaks, default=None), "GiB", "the dry run's", None)
        report_mfu(found, item, name, 6 * parameters * speeds[name])
        shutil.rmtree(runs)  # its checkpoint has several gigabytes
    compare_runs(found, item, speeds, losses)


PEAK_MEMORY = "throughput/peak_memory_gib"


def report_mfu(found: Findings, item: str, name: str, flops: float) -> None:
    """Add the model FLOP utilization of a run that computes `flops` per second, if the device's peak is known."""
    device = torch.cuda.get_device_name() if CUDA else ""
    peak = next((value for key, value in PEAKS.items() if key in device), None)
    value = flops / peak if peak else None
    found.add(item, f"{name}: MFU", value, "", "at least 0.2", None if value is None else value >= 0.2)


def compare_runs(found: Findings, item: str, speeds: dict[str, float], losses: dict[str, float]) -> None:
    """Add the ratios of the speeds, and the differences of the first losses, of DPO's three runs."""
    with_cudnn, packed, varlen = list(RUNS)[:3]
    for name, fast, slow in (("cuDNN", packed, with_cudnn), ("packed attention", varlen, packed)):
        if fast in speeds and slow in speeds:
            ratio = speeds[fast] / speeds[slow]
            found.add(item, f"{name} slows DPO down by", ratio, "times", "at most 1.2", ratio <= 1.2 if CUDA else None)
            gap = abs(losses[fast] - losses[slow])
            found.add(item, f"first loss of {fast} and {slow} differs by", gap, "", "at most 0.01", gap <= 0.01)


def check_peer(found: Findings, item: str, dry: bool) -> None:
    """Time steps in turn with TRL's on the same tokens, if it is installed."""
    from measure import Runner
    from steps import Rows, count_step_flops, load_model, make_step, read_batches

    options = argparse.Namespace(
        device=DEVICE.type, clock="wall", optimizer=False, tiny=dry, threads=None, data=None, longest=[256],
        model=str(found.path.parent / "model"), cache=str(found.path.parent / "cache"),
    )  # fmt: skip
    pairs, peer = read_batches(options)[256], importlib.util.find_spec("trl") is not None
    model = load_model(options)
    run = Runner(model, options)
    for work in ("SFT", "DPO"):
        names = [work, f"TRL {work}"] if peer else [work]
        steps = {name: make_step(name, model, pairs) for name in names}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        losses = {name: run(step)[1] for name, step in steps.items()}
        for _ in range(2 if dry else 10):
            for name, step in steps.items():
                seconds[name].append(run(step)[0])
        for name, step in steps.items():
            median = statistics.median(seconds[name])
            speed = Rows(name, pairs).real / median
            found.add(item, f"{name} step: speed", speed, "tokens per second", "see the ratio", None)
            found.add(item, f"{name} step: peak memory", run.memory(step), "MiB", "see the ratio", None)
            report_mfu(found, item, f"{name} step", count_step_flops(model, name, pairs) / median)
        if peer:
            ratio = statistics.median(seconds[f"TRL {work}"]) / statistics.median(seconds[work])
            found.add(item, f"{work} over TRL: speed", ratio, "times", "at least 1", ratio >= 1 if CUDA else None)
            gap = abs(losses[work] - losses[f"TRL {work}"])
            bound = 0.02 if CUDA else 1e-4
            found.add(item, f"{work} and TRL: losses differ by", gap, "", f"at most {bound}", gap <= bound)
    if not peer:
        found.add(item, "TRL", "is not installed", "", "trl, to compare the speed", None)


CHECKS = {
    check_tests: "Tests that need a CUDA device, which have never run.",
    check_runs: "Whole runs fail on a GPU, or are slowed down by the attention's kernel.",
    check_peer: "Steps are slower than TRL's on a GPU, although they compute fewer tokens.",
}


def main() -> None:
    """Run all checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry", action="store_true", help="tiny sizes, also on a CPU")
    options = parser.parse_args()
    if not CUDA and not options.dry:
        raise SystemExit("No CUDA device was found. DRY=1 checks that the script runs through.")
    found = Findings(options.folder)
    for check, item in CHECKS.items():
        found.run(check, item, options.dry)


if __name__ == "__main__":
    main()
