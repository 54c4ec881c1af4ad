"""What an item would take, for dry=true: work, memory, hours of a GPU, disk, and what must be downloaded.

Hours follow from arithmetic at a fraction of a GPU's speed, and have not been compared with a GPU:

- Operations are counted by `var/training/work.py`. `tflops` is how many a GPU does per second in training. The default,
  125, is 40 % of an A100's 312 in bfloat16.
- Evaluations during training are not counted.
- Tokens are an upper bound until the data is read: each sequence counts with data.max_length.
"""

import re
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments.items.base import Command
from experiments.jobs import ROOT, Job, count_gpus
from experiments.overrides import ROOTS, compose_command, find_missing
from var.data.sources.hub import HubSource
from var.models.gguf import MODEL_PACKAGES
from var.training.alternatives import describe_stages
from var.training.memory import GIB, MemoryModel
from var.training.run import Run
from var.training.work import SAMPLING_SPEED, SCORING, count_operations, count_parameters, count_work
from var.utils.errors import UserError

CARDS = {"llama3.1-8b": 8, "qwen2.5-14b": 8, "qwen2.5-32b-int4": 32}  # of the paper's GPUs; other models: 4
HHA_PROMPTS = 8_206  # without helpful_rejection's bad rows and the others'; the paper: 8.2k


@dataclass(frozen=True)
class Estimate:
    """What a command takes."""

    work: str
    hours: float | None
    """Of one GPU; None if it is not known."""
    disk: float = 0.0
    """Bytes of the exported model and a checkpoint."""
    memory: tuple[str, ...] = ()
    """The verdict of the memory check and each stage's bytes."""


def show(items: Mapping[str, Sequence[Job]], tflops: float) -> None:
    """Print what each item takes: its commands, and the sums."""
    seen = set[Path]()
    total, disk, unknown, downloads = 0.0, 0.0, 0, dict[str, str]()
    for name, jobs in items.items():
        ordered = [one for job in jobs for one in job.in_order()]
        print(f"{name}: {len({job.folder for job in ordered})} commands")
        for job in ordered:
            if job.folder in seen:
                continue
            seen.add(job.folder)
            print(f"\n$ {shlex.join(job.portable)}")
            estimate = _estimate(job.command, tflops)
            if estimate is None:
                continue
            print("\n".join(f"    {line}" for line in (estimate.work, *estimate.memory)))
            if estimate.hours is None:
                unknown += 1
            else:
                print(f"    about {estimate.hours:.1f} GPU-hours")
                total += estimate.hours
            disk += estimate.disk
            downloads |= list_downloads(job.command)
        print()
    print(f"In all: {len(seen)} commands, about {total:.1f} GPU-hours at {tflops:g} TFLOP/s per GPU", end="")
    print(f" and {unknown} commands of unknown length" if unknown else "", end="")
    print(f"; {disk / GIB:.0f} GiB on disk without the annotation cache")
    print("To download:" if downloads else "Nothing to download", flush=True)
    for place, licence in downloads.items():
        print(f"  {place}{f' ({licence})' if licence else ''}", flush=True)


@cache
def _estimate(command: Command, tflops: float) -> Estimate | None:
    root = ROOTS.get(command.program[0])
    if root is None:
        return None
    words = ["seed=0" if word.startswith("seed=") else word for word in command.words if not word.startswith("init=")]
    cfg = compose_command(root, Command(command.program, tuple(words), command.result), ())
    if missing := find_missing(cfg):
        return Estimate(f"not known without {', '.join(f'{key}=' for key in missing)}", None)
    speed = tflops * 1e12 * 3600
    if command.program[0] == "train.py":
        return _estimate_training(cfg, speed)
    return _estimate_sampling(cfg, speed, all_pairs="figure4" in command.program[0])


def _estimate_training(cfg: DictConfig, speed: float) -> Estimate:
    gpu = count_gpus() > 0
    if not gpu and cfg.model.name != "smollm2-135m" and cfg.trainer.device_memory is None:
        cfg.trainer.devices, cfg.trainer.device_memory = CARDS.get(cfg.model.name, 4), "80GiB"
    cfg.dry = True
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = Run.compose(cfg, Path(folder))
        except UserError as error:
            return Estimate(f"refused: {error}", None)
        model, plan, work = MemoryModel.of(run.cfg, run.settings), run.memory, count_work(run)
        checkpoint, export = model.disk()
        memory = tuple(_describe_memory(plan)) if plan else ()
        if work is None:
            return Estimate("rows are not known before the data is read", None, checkpoint + export, memory)
        needed = count_operations(run, work, model.counts.total)
    operations = needed.annotating + needed.training
    return Estimate(work.describe(), operations / speed, checkpoint + export, memory)


def _describe_memory(plan: Any) -> Iterator[str]:
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    cards = f"{plan.devices} × {plan.memory / GIB:.0f} GiB with strategy={plan.strategy}"
    yield f"{verdict} on {cards}; it needs {plan.needed / GIB:.1f} GiB per device"
    yield from (line.strip() for line in describe_stages(plan))


def _estimate_sampling(cfg: DictConfig, speed: float, all_pairs: bool) -> Estimate:
    """Estimate an evaluation or a sampling: responses of the longest length, and their reward.

    all_pairs: whether each prompt is also scored with the response of each.
    """
    per_subset, subsets = cfg.get("prompts"), 4 if cfg.data.name == "hha" else 1
    rows = {"hha": HHA_PROMPTS, "alpaca_eval": 805, "arena_hard": 500}.get(cfg.data.name, cfg.data.get("sample"))
    prompts = per_subset * subsets if per_subset else rows
    if prompts is None:
        return Estimate("the number of prompts is not known before the data is read", None)
    responses = len(cfg.seeds) if "seeds" in cfg else cfg.generate.responses
    parameters, reward = count_parameters(cfg.model), count_parameters(cfg.reward)
    tokens = prompts * responses * cfg.generate.max_new_tokens
    operations = tokens * SCORING * (parameters / SAMPLING_SPEED["cuda"] + reward)
    work = f"{prompts:,} prompts × {responses} responses of at most {cfg.generate.max_new_tokens} tokens"
    if all_pairs:
        operations += prompts**2 * cfg.data.max_length * SCORING * (parameters + reward)
        work += f", and {prompts**2:,} pairs"
    if cfg.get("benchmarks"):
        work += ", and benchmarks, which are not counted"
    return Estimate(work, operations / speed)


def list_downloads(command: Command) -> dict[str, str]:
    """Return what a command needs from the hub, with the licence where its configuration names one."""
    root = ROOTS[command.program[0]]
    cfg = compose_command(root, command, ())
    found = dict[str, str]()
    for name in ("model", "reward"):
        part = cfg[name]
        if part and part.get("repository") and part.repository not in MODEL_PACKAGES:
            found[part.repository] = _read_licence(name, part.get("name", "offsetbias-rm-8b"))
    for part in (cfg.data, *(cfg.get("more") or {}).values()):
        if OmegaConf.is_missing(part, "folder"):
            found["the folder of HHA files: data.folder="] = ""
        elif isinstance(source := instantiate(part.source), HubSource) and not source.is_local:
            found |= {piece.path: getattr(source, "license", None) or "" for piece in source.parts}
    return found


def _read_licence(group: str, name: str) -> str:
    """Return what the first lines of a configuration, and of those that it extends, say about a licence."""
    path = ROOT / "conf" / group / f"{name}.yaml"
    if not path.exists():
        return ""
    text = path.read_text()
    head = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    sentences = re.split(r"\.\s", head)
    if found := next((sentence for sentence in sentences if re.search("License|Apache", sentence)), None):
        return found.strip(". ")
    parents = yaml.safe_load(text).get("defaults", [])
    return next((text for parent in parents if isinstance(parent, str) and (text := _read_licence(group, parent))), "")
