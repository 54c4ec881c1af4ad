"""Record what a fixed set of runs computes, and compare two recordings to the last bit.

Run it before and after a refactoring, in two checkouts:

    python tests/same_curves.py record /tmp/before
    python tests/same_curves.py record /tmp/after
    python tests/same_curves.py compare /tmp/before /tmp/after

A recording holds one JSON file per run: curves, closing numbers, the plan with its weights, sampled answers, and a hash
of each tensor of the exported model. Timing columns are not recorded. The runs drive `train.py` as a user does, so the
recording does not depend on the package's internal names. All runs take about 10 minutes on two cores.
"""

import argparse
import csv
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LOSSES = (
    "sft", "var", "var_sampled", "var_value", "dpo", "kto", "alol", "infonca", "ppo", "grpo", "var_online",
    "bradley_terry",
)  # fmt: skip
LIVE = ("var", "dpo", "kto", "infonca", "alol")  # losses that use the reference in each step
TIMING = ("throughput/", "seconds")
# Names that changed on purpose since a recording was made, old to new.
RENAMED: dict[str, str] = {
    "train/groups/without_signal": "train/groups/zero_variance",
    "train/rollout/cut": "train/rollout/truncated",
    "cut": "truncated",
}


@dataclass(frozen=True, kw_only=True)
class Distinct:
    """A reward in [0, 1]: the fraction of distinct characters."""

    scores_text = True
    fingerprint = {"program": "distinct"}  # noqa: RUF012

    def __call__(self, prompts: Any, responses: list[str], answers: Any) -> list[float]:
        return [len(set(text)) / max(8, len(text)) for text in responses]


def record(out: Path, only: str | None) -> None:
    """Run everything, two runs at a time, and write one JSON file per run."""
    out.mkdir(parents=True, exist_ok=True)
    model, rows = out / "tiny", out / "rows.jsonl"
    write_model(model)
    write_rows(rows)
    tiny = [
        f"model.path={model}", "data=files", f"data.path={rows}", "reward=exact_number",
        "reward._target_=tests.same_curves.Distinct", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1",
        "trainer.max_steps=6", "trainer.checkpoint_every_n_steps=2", "data.validation_prompts=3",
        "data.micro_batch=2", "data.global_batch=4", "eval.sampling.responses=2", "eval.sampling.max_new_tokens=4",
        "eval.every_n_steps=3", "generate.responses=3", "generate.max_new_tokens=6", "optim.optimizer.lr=1e-2",
    ]  # fmt: skip
    jobs: list[tuple[str, list[str], bool]] = [("default", ["trainer.max_steps=6"], False)]
    for loss in LOSSES:
        more = [f"loss={loss}"]
        if loss == "alol":
            more += ["loss.value.development_prompts=2", "loss.value.epochs=2"]
        if loss == "bradley_terry":
            more = [option for option in more if not option.startswith("eval")]
        jobs.append((loss, [*tiny, *more], False))
        jobs.append((f"{loss}-resumed", [*tiny, *more], True))
        jobs.append((f"{loss}-two-ranks", [*tiny, *more, "trainer.devices=2", "strategy=ddp"], False))
        if loss in LIVE:
            jobs.append((f"{loss}-live", [*tiny, *more, "reference=live"], False))
    jobs = [job for job in jobs if only is None or only in job[0]]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: run(out, *job), jobs))


def run(out: Path, name: str, overrides: list[str], interrupt: bool) -> None:
    """One training run; with `interrupt` it is stopped at its first checkpoint and resumed."""
    work = out / "work" / name
    command = [
        sys.executable, str(ROOT / "train.py"), *overrides, f"annotation_cache={work}/store", f"cache={work}/cache",
        f"runs={work}/runs",
    ]  # fmt: skip
    if name == "default":
        command = [option for option in command if not option.startswith("cache=")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    work.mkdir(parents=True, exist_ok=True)
    with (work / "out").open("w") as log:
        if interrupt:
            child = subprocess.Popen(command, cwd=work, env=environment, stdout=log, stderr=subprocess.STDOUT)
            while child.poll() is None and not list((work / "runs").glob("*/checkpoints/step-2.ckpt")):
                time.sleep(0.01)
            child.send_signal(signal.SIGTERM)
            child.wait()
        status = subprocess.run(command, cwd=work, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if status.returncode:
        print(f"{name}: exit status {status.returncode}, see {work / 'out'}", flush=True)
        return
    (folder,) = (work / "runs").iterdir()
    (out / f"{name}.json").write_text(json.dumps(contents(folder), indent=1, sort_keys=True))
    print(f"{name}: recorded", flush=True)


def contents(folder: Path) -> dict[str, Any]:
    """What a run left, without times and places."""
    import numpy as np
    from safetensors.numpy import load_file

    with (folder / "metrics.csv").open(newline="") as file:
        curves = [
            {key: value for key, value in row.items() if value and not key.startswith(TIMING)}
            for row in csv.DictReader(file)
        ]
    summary = json.loads((folder / "summary.json").read_text())
    with np.load(folder / "plan.npz") as file:
        plan = {name: digest(file[name]) for name in file.files}
    lines = {
        name: (folder / name).read_text().splitlines()
        for name in ("samples.jsonl", "batches.jsonl", "evaluations.jsonl")
        if (folder / name).exists()
    }
    model = {name: digest(tensor) for name, tensor in load_file(folder / "model" / "model.safetensors").items()}
    kept = ("validation", "reward", "steps", "skipped_steps", "ess")
    return {"curves": curves, "summary": {key: summary[key] for key in kept}, "plan": plan, **lines, "model": model}


def digest(array: Any) -> str:
    return hashlib.sha256(str(array.dtype).encode() + str(array.shape).encode() + array.tobytes()).hexdigest()[:16]


def write_model(folder: Path) -> None:
    """A random Llama of two layers with a byte tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(ROOT))
    from notebooks.tiny import SIZES, byte_tokenizer

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.2)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def write_rows(path: Path) -> None:
    """16 prompts with three weighted answers each, every third one truncated."""
    draw = random.Random(2)
    with path.open("w") as file:
        for i in range(16):
            texts = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) + str(k) for k in range(3)]
            responses = [{"text": t, "weight": draw.uniform(0.5, 1.5), "finished": t[-1] != "2"} for t in texts]
            file.write(json.dumps({"id": f"r{i}", "prompt": f"{i}?", "responses": responses}) + "\n")


def rename(value: Any) -> Any:
    if isinstance(value, dict):
        return {RENAMED.get(key, key): rename(child) for key, child in value.items()}
    return [rename(child) for child in value] if isinstance(value, list) else value


def compare(before: Path, after: Path) -> int:
    """Print every run that differs and where; return the number of differences."""
    different = 0
    for file in sorted(before.glob("*.json")):
        other = after / file.name
        if not other.exists():
            print(f"{file.stem}: not in {after}")
            different += 1
            continue
        one, two = rename(json.loads(file.read_text())), json.loads(other.read_text())
        parts = [key for key in sorted(one.keys() | two.keys()) if one.get(key) != two.get(key)]
        print(f"{file.stem}: {'equal' if not parts else 'DIFFERENT in ' + ', '.join(parts)}")
        different += bool(parts)
    return different


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("out", type=Path)
    recording.add_argument("--only", help="record only runs whose name contains this")
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "record":
        record(arguments.out.absolute(), arguments.only)
    else:
        sys.exit(min(1, compare(arguments.before, arguments.after)))
