"""What a run trains on, and about how long it takes: rows, steps, tokens, floating-point operations and seconds."""

import math
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
from omegaconf import DictConfig

from var.config.schema import TrainerSettings
from var.requirements import Rollout, find
from var.training.run import PRECISIONS, Run

SCORING, TRAINING, RECOMPUTING = 2, 6, 8
"""Operations per parameter and token: forward, with the backward pass, and with gradient checkpointing."""
SAMPLING_SPEED = {"cpu": 0.5, "cuda": 0.1}
"""Speed of sampling, relative to training: it reads all weights for each token. The second one is assumed."""
USED = {"cpu": 0.85, "cuda": 0.4}
"""How much of the speed of a matrix product training reaches. The second one is assumed."""
ELSEWHERE = 100e12
"""Operations per second of a device that is not here."""


@dataclass(frozen=True)
class Work:
    """What a run trains on. Steps and tokens are estimated until the plan is made.

    If the data is not read yet, each sequence counts with data.max_length. Otherwise it counts with the mean length of
    its prompt and response, or of its prompt and generate.max_new_tokens if responses are sampled.
    """

    rows: int
    prompts: int
    """Rows that train, after data.limit and data.sample and without those of validation."""
    samples: bool
    """Whether their responses are sampled before training."""
    read: bool
    """Whether the data was read. Otherwise `rows` is the number on the hub."""
    planned: bool
    """Whether steps and tokens are exact."""
    epochs: int
    steps: int
    """Optimizer steps in all epochs."""
    tokens: int
    """Prompt and response tokens in all steps."""
    tokens_per_epoch: int
    """Those of an epoch, which trainer.max_steps may end early."""

    def describe(self) -> str:
        """Return rows, optimizer steps and tokens as a text."""
        about, most = ("", "") if self.planned else ("about ", "about " if self.read else "at most ")
        rows = f"{self.rows:,} rows{'' if self.read else ' on the hub'}"
        return f"{rows}; {about}{self.steps:,} optimizer steps in {self.epochs} epochs; {most}{self.tokens:,} tokens"


def count_work(run: Run) -> Work | None:
    """Return what a run trains on, or None if the number of rows is not known."""
    data, cfg = run.data, run.cfg
    epochs, online = cfg.trainer.epochs, find(data.requirements, Rollout)
    rows = data.report.rows or getattr(data.source, "expected_rows", None)
    if rows is None:
        return None
    planned = None if online else data.report.steps_per_epoch  # what is sampled in training is not known
    prompts = max(0, min(rows, cfg.data.limit or cfg.data.sample or rows) - cfg.data.validation_prompts)
    own = getattr(data.source, "expected_responses", 1)
    if data.has_rows:
        own = data.training_set.rows.facts["responses"].mean()
    samples = data.samples_responses or (not own and not online)
    if planned:
        steps = planned
        tokens = int(data.training_set.plan.work.sum())
    else:
        several = data.training_set.unit == "sequence" and cfg.data.responses in ("auto", "both", "all", "sampled")
        each = (cfg.generate.responses if samples else own) if several and not online else 1
        steps = math.ceil(prompts * each / cfg.data.global_batch)
        of_unit = {"pair": 2, "group": cfg.generate.responses}.get(data.training_set.unit, 1)
        together = cfg.generate.responses if online else of_unit
        tokens = steps * cfg.data.global_batch * together * estimate_length(run)
    steps *= online.passes if online else 1
    total = steps * epochs
    done = min(total, cfg.trainer.max_steps) if cfg.trainer.max_steps > 0 else total
    return Work(
        rows=rows, prompts=prompts, samples=samples, read=bool(data.report.rows), planned=bool(planned), epochs=epochs,
        steps=done, tokens=tokens * done // max(1, steps), tokens_per_epoch=tokens,
    )  # fmt: skip


def estimate_length(run: Run) -> int:
    """Return the tokens of a sequence: about, from up to 256 of the rows that are read, or else data.max_length."""
    data, limit = run.data, run.cfg.data.max_length
    if not data.has_rows:
        return int(limit)
    rows, chat = data.training_set.rows, run.annotator.chat
    sampled = data.samples_responses or find(data.requirements, Rollout)
    lengths = []
    for row in (rows[i] for i in range(0, len(rows), -(-len(rows) // 256))):
        texts = [] if sampled else [one.text for one in row.responses]
        own = [len(chat.tokenizer(text)["input_ids"]) for text in texts] or [run.cfg.generate.max_new_tokens]
        lengths.append(min(limit, len(chat.prompt(row.prompt)) + sum(own) / len(own)))
    return round(sum(lengths) / len(lengths))


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of a run, by stage. Those of sampling count as if they ran at the speed of training."""

    annotating: float
    training: float
    """Those of an online run's samples included."""
    evaluating: float


def count_operations(run: Run, work: Work, parameters: int, kind: Literal["cpu", "cuda"] = "cuda") -> Operations:
    """Return about the operations of a run. Sampled responses count with their longest length.

    What the annotation cache has is counted too. kind: of the device, which decides how slow sampling is.
    """
    cfg, once = run.cfg, work.tokens_per_epoch
    sampling = SCORING / SAMPLING_SPEED[kind]
    estimators = [estimator for one in run.data.requirements if (estimator := getattr(one, "estimator", None))]
    inputs = {name for estimator in estimators for name in estimator.inputs}
    online, reward = find(run.data.requirements, Rollout), count_parameters(cfg.reward)
    annotating = 0.0
    training = (RECOMPUTING if cfg.model.gradient_checkpointing else TRAINING) * parameters * work.tokens
    if run.data.requirements:
        scored = cfg.data.micro_batch if "cross_rewards" in inputs else 1
        once_each = any(one.reads_reference for one in run.data.requirements)
        read = cfg.data.micro_batch if "cross_logps" in inputs else float(once_each)
        annotating += SCORING * once * (scored * reward + read * parameters)
    if online is not None:
        training += sampling * parameters * work.tokens * min(1, cfg.generate.max_new_tokens / estimate_length(run))
    elif work.samples:
        annotating += work.prompts * cfg.generate.responses * cfg.generate.max_new_tokens * sampling * parameters
    for estimator in (one for one in estimators if "candidates" in one.inputs):
        tokens = work.prompts * estimator.candidates * cfg.generate.max_new_tokens
        annotating += tokens * (sampling * parameters + SCORING * reward)
    evaluating = 0.0
    if run.samples_validation:
        times = 2 + (work.steps - 1) // cfg.eval.every_n_steps if cfg.eval.every_n_steps else 2
        one = cfg.eval.sampling
        tokens = cfg.data.validation_prompts * one.responses * one.max_new_tokens
        evaluating = times * tokens * (sampling * parameters + SCORING * (2 * parameters + reward))
    return Operations(annotating, training, evaluating)


def describe_time(operations: Operations, settings: TrainerSettings) -> str:
    """Return about how long a run takes: on this machine if it has the devices, else at a speed that is named."""
    kind = "cuda" if settings.gpu else "cpu"
    if settings.gpu and not torch.cuda.is_available():
        speed, where = ELSEWHERE, f"{ELSEWHERE / 1e12:.0f} TFLOP/s per device"
    else:
        full = measure_speed(kind, PRECISIONS[settings.arithmetic] or torch.float32)
        speed = USED[kind] * full
        where = f"{USED[kind]:.0%} of the {full / 1e9:,.0f} GFLOP/s of a matrix product here"
    speed *= settings.world if settings.gpu else 1
    stages = {"annotation": operations.annotating, "training": operations.training, "evaluation": operations.evaluating}
    seconds = {name: count / speed for name, count in stages.items()}
    if settings.max_seconds is not None:  # of sampling, scoring and training
        seconds["training"] = min(seconds["training"], max(0, settings.max_seconds - seconds["annotation"]))
    parts = [f"{name} {timedelta(seconds=round(count))}" for name, count in seconds.items()]
    return f"time, about: {', '.join(parts)} (at {where})"


def measure_speed(kind: str, dtype: torch.dtype) -> float:
    """Return the operations per second of a matrix product on this device."""
    size = 4096 if kind == "cuda" else 1024
    one = torch.ones(size, size, device=kind, dtype=dtype)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        (one @ one)[0, 0].item()  # waits for it
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def count_parameters(part: DictConfig | None) -> int:
    """Return the parameters of a model or a reward model, with one table of embeddings; 0 for a program."""
    if part is None or not (sizes := part.get("architecture")):
        return 0
    hidden, layers, vocabulary = sizes["hidden_size"], sizes["num_hidden_layers"], sizes["vocab_size"]
    key = hidden * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * key + 3 * hidden * sizes["intermediate_size"]
    return int(layers * layer + vocabulary * hidden)
