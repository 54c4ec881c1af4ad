"""From a checked configuration to the parts of a run: data, module and trainer."""

import gc
import math
import shlex
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, RichModelSummary
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.profilers import PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from omegaconf import DictConfig, OmegaConf

from var.annotate.annotator import Annotator
from var.annotate.cache import AnnotationCache
from var.annotate.responses import check_prompts
from var.config.check import TRAIN, check
from var.config.entry import name_command
from var.config.schema import EvalSettings, TrainerSettings, pick_fields
from var.config.sweep import is_multirun
from var.data.clock import fix_today
from var.data.settings import DataSettings
from var.losses.base import Loss
from var.models.export import read_dtype
from var.models.frozen import FrozenModel
from var.models.lora import LoRA
from var.models.policy import Policy
from var.models.pretrained import Pretrained
from var.models.reward_model import RewardModel
from var.models.sharding import load_to_shard
from var.models.value_head import ActorCritic
from var.requirements import SequenceScores, TokenValues, find
from var.rewards.base import Reward, check_answers
from var.rewards.scale import Scale
from var.sampling.base import Sampling
from var.training.alternatives import MemoryPlan, choose_strategy
from var.training.checkpoints import (
    Checkpoints,
    DirectCheckpointIO,
    check_disk_space,
    checkpoints,
    find_checkpoint,
    read_checkpoint,
)
from var.training.checks import (
    check_adapter,
    check_optimizer,
    check_ranks,
    check_seed,
    check_strategy,
    choose_devices,
    count_accumulation,
    list_overrides,
    locate_initial_model,
    warn_of_other_arguments,
)
from var.training.datamodule import AlignmentData
from var.training.loggers import Curves, PlanFile, make_loggers
from var.training.metrics import Budget, PeakMemory, ProgressBar, ProgressLines, StepMetrics
from var.training.module import AlignmentModule
from var.training.resume import Settings
from var.training.sharded import ShardingStrategy
from var.training.validation import PairAccuracy, Validation, evaluate_reference
from var.utils.console import shows_progress, silence_libraries, warn
from var.utils.distributed import bind_device
from var.utils.errors import UserError, check_all

PROFILERS: dict[str, Any] = {
    "simple": lambda folder: SimpleProfiler(folder, "profile"),
    "pytorch": lambda folder: PyTorchProfiler(folder, "profile"),
}
PRECISIONS = {"32-true": None, "64-true": None, "bf16-mixed": torch.bfloat16}


@dataclass
class Run:
    """The parts of one run."""

    cfg: DictConfig
    """The composed configuration."""
    folder: Path
    """Where the run writes."""
    pretrained: Pretrained
    """The model that the policy and the reference start from."""
    adapter: LoRA | None
    """The adapter that trains; None if the whole model does."""
    loss: Loss
    """The objective."""
    data: AlignmentData
    """What it trains on."""
    settings: TrainerSettings
    """How long, where and in which precision."""
    memory: MemoryPlan | None
    """What it needs on GPUs; None on CPUs."""
    peaks: PeakMemory = field(default_factory=PeakMemory)
    """The peak memory of each stage."""
    recorded: Settings = field(init=False)
    """The settings, those of the checkpoint it resumes from, and what becomes of the difference."""

    @classmethod
    def compose(cls, cfg: DictConfig, folder: Path, trains: bool = True, own_folder: bool = True) -> "Run":
        """Check the configuration as a whole and build what is cheap. No model is loaded.

        trains: whether it is trained, so that its optimizer steps are divided between the processes.
        own_folder: whether `folder` is the run's, which keeps the date that chat templates read for the next start.
        """
        gc.enable()  # see run_command
        silence_libraries()
        check(cfg, TRAIN)
        check_all(
            lambda: DataSettings(**pick_fields(DataSettings, cfg.data)),
            lambda: TrainerSettings(**cfg.trainer),
            lambda: EvalSettings(**cfg.eval),
            lambda: Sampling(**cfg.generate),
            lambda: check_optimizer(cfg),
            lambda: check_seed(cfg.seed),
        )
        data_settings = DataSettings(**pick_fields(DataSettings, cfg.data))
        settings = choose_devices(cfg, TrainerSettings(**cfg.trainer))
        if is_multirun():
            gc.collect()  # the previous job's trainer and model refer to each other
        if cfg.reward is None:
            raise UserError("reward=none: only eval.py runs without a reward. reward=score loads no reward model.")
        if settings.device_memory is not None and not cfg.dry and not torch.cuda.is_available():
            raise UserError("trainer.device_memory describes GPUs, and this machine has none. Use it with debug=dry.")
        check_ranks(settings)
        device = bind_device() if settings.gpu else "cpu"
        if cfg.dry and cfg.annotate == "error":
            raise UserError("annotate=error has no effect with debug=dry, which computes nothing")
        fix_today(folder / "date.txt" if own_folder else None, keep=not (cfg.dry or cfg.show_rows))
        pretrained = locate_initial_model(cfg)
        if cfg.init is not None:
            warn_of_other_arguments(pretrained.folder, pretrained)
        pretrained = pretrained.with_attention_for(settings.gpu, half=PRECISIONS[settings.arithmetic] is not None)
        adapter, loss = instantiate(cfg.adapter) if cfg.adapter else None, instantiate(cfg.loss)
        annotator = Annotator(
            annotations=AnnotationCache(Path(cfg.annotation_cache).expanduser(), warn=warn),
            reference=FrozenModel(pretrained, device, PRECISIONS[settings.arithmetic]),
            reward=instantiate(cfg.reward),
            cache=Path(cfg.cache).expanduser(),
            sampler=instantiate(cfg.sampler),
            annotate=cfg.annotate,
            on_template_change=cfg.data.on_template_change,
            command=shlex.join([*name_command("annotate"), *list_overrides()]),
            dry=cfg.dry,
        )
        data = AlignmentData(
            source=instantiate(cfg.data.source),
            settings=data_settings,
            loss=loss,
            annotator=annotator,
            sampling=Sampling(**cfg.generate),
            scale=Scale(kind=cfg.reward_scale),
            live=cfg.reference == "live",
        )
        check_adapter(cfg, pretrained, adapter)
        if trains:
            count_accumulation(cfg, settings)
        cfg, plan = choose_strategy(cfg, settings)
        annotator.reference.shard = cfg.strategy.name == "fsdp" if plan is None else plan.shard_reference
        run = cls(cfg, folder, pretrained, adapter, loss, data, settings, plan)
        data.saved = run.saved.get("AlignmentData")
        run.recorded = Settings(cfg, settings, folder, run.saved or None)
        return run

    @property
    def annotator(self) -> Annotator:
        """Computes numbers or reads them from the cache."""
        return self.data.annotator

    def module(self) -> AlignmentModule:
        """Load the policy and return it ready to train, with its loss."""
        cfg, pretrained, requirements = self.cfg, self.pretrained, self.data.requirements
        scores = find(requirements, SequenceScores) is not None
        if self.adapter and (pretrained.quantization or not self.adapter.merge) and pretrained.base is not None:
            raise UserError(
                f"adapter: {pretrained.folder} is an adapter itself. Start from a model that was exported with "
                "adapter.merge=true."
            )
        # No file holds a reward model's new head or a new adapter.
        by_part = cfg.strategy.name == "fsdp" and self.adapter is None and not scores
        model, fill = load_to_shard(pretrained) if by_part else (None, None)
        if model is None:
            model = pretrained.load_scorer(new_head=True) if scores else pretrained.load()
        if self.adapter is not None:
            model = self.adapter.attach(model, *pretrained.location)
        policy: Policy | ActorCritic | RewardModel = RewardModel(model.train()) if scores else Policy(model.train())
        if find(requirements, TokenValues):
            policy = ActorCritic(policy)  # type: ignore[arg-type]
        if self.adapter is not None and not isinstance(policy, RewardModel):
            self.annotator.reference.share_weights(policy)
        reference = self.annotator.reference if cfg.reference == "live" else None
        module = AlignmentModule(
            policy, self.loss, self.data.providers, instantiate(cfg.optim.optimizer, _convert_="all"),
            instantiate(cfg.optim.schedule), reference, self.settings.nonfinite, fill,
            self.memory is None or self.memory.gather,
        )  # fmt: skip
        if self.settings.arithmetic == "64-true":
            module = module.double()
        check_disk_space(self.folder, policy, module.optimizer, self.export_dtype)
        return module

    def trainer(self, *before_evaluation: Callback) -> lightning.Trainer:
        """Return the trainer with its callbacks and loggers.

        before_evaluation: callbacks that run before the evaluation, at the end of training too.
        """
        cfg, settings = self.cfg, self.settings
        self.validation = self._validation()
        self.steps = StepMetrics(settings.ess_warning)
        budget = Budget(math.inf if settings.max_seconds is None else settings.max_seconds)
        saving = Checkpoints(self.folder / "checkpoints", settings.checkpoint_every_n_steps)
        # A step is saved before it is evaluated, so a run that is stopped during evaluation has it.
        # The peaks come before the clock of the steps, since memory is returned between two stages.
        callbacks: list[Any] = [self.recorded, self.peaks, self.steps, budget, saving, PlanFile(self.folder)]
        callbacks += [*before_evaluation, *([self.validation] if self.validation else [])]
        callbacks += [ProgressBar(), RichModelSummary(max_depth=1)] if shows_progress() else [ProgressLines()]
        strategy = cfg.strategy.name
        check_strategy(cfg, settings)
        if "_target_" in cfg.strategy:
            extra = {"data_parallel_size": settings.world, "tensor_parallel_size": 1} if strategy == "fsdp" else {}
            options = {k: v for k, v in cfg.strategy.items() if k != "name"}
            strategy = instantiate(OmegaConf.create(options), timeout=settings.timeout, **extra)
            if type(strategy) is ModelParallelStrategy:  # not by conf/: a run's folder is named after its configuration
                strategy.__class__ = ShardingStrategy
        elif settings.world > 1:
            strategy = DDPStrategy(timeout=settings.timeout)
        slurm = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
        curves = Curves(self.folder / "metrics.csv", self.saved.get("global_step"))
        return lightning.Trainer(
            accelerator="gpu" if settings.gpu else "cpu",
            devices=settings.local,
            num_nodes=settings.num_nodes,
            strategy=strategy,
            # The module itself is double. Lightning's 64-true would convert the batch, which is frozen.
            precision="32-true" if settings.arithmetic == "64-true" else settings.arithmetic,  # type: ignore[arg-type]
            max_epochs=settings.epochs,
            max_steps=settings.max_steps,
            accumulate_grad_batches=count_accumulation(cfg, settings),
            gradient_clip_val=settings.gradient_clip or None,
            log_every_n_steps=settings.log_every_n_steps,
            logger=[curves, *make_loggers(cfg, self.folder, curves, bool(self.recorded.changes))],
            callbacks=callbacks,
            # `Checkpoints` handles SLURM's signals. Lightning's own handler would save in the middle of a step.
            plugins=[DirectCheckpointIO(), *slurm],
            deterministic=settings.deterministic,
            profiler=PROFILERS[settings.profiler](self.folder) if settings.profiler else None,
            default_root_dir=self.folder,
            enable_checkpointing=False,  # Lightning's own; ours is a callback
            enable_progress_bar=shows_progress(),
            enable_model_summary=shows_progress(),
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
        )

    def _validation(self) -> Validation | PairAccuracy | None:
        cfg, sampling = self.cfg, Sampling(**self.cfg.eval.sampling)
        if not cfg.eval.enabled:
            return None
        if cfg.eval.judge and not isinstance(cfg.eval.judge, DictConfig):
            name = cfg.eval.judge
            raise UserError(f"eval.judge={name} must be a judge's configuration. Write +judge@eval.judge={name}.")
        judge = instantiate(cfg.eval.judge) if cfg.eval.judge else None
        if judge:
            judge.check()
        if find(self.data.requirements, SequenceScores):
            if judge:
                raise UserError("eval.judge compares responses, and a reward model gives none. Set eval.judge=null.")
            return PairAccuracy(self.peaks)
        if reward := self.validation_reward:
            reward.fingerprint  # noqa: B018  raises errors of its model
        return Validation(
            sampling, cfg.eval.every_n_steps, reward, judge, cfg.eval.judged, self.annotator, self.folder, self.peaks
        )

    @cached_property
    def export_dtype(self) -> torch.dtype:
        """The dtype of the exported model."""
        if self.settings.export_dtype == "float32":
            return torch.float32
        return read_dtype((self.pretrained.base or self.pretrained).folder)

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint to resume from: what `resume` names, or this folder's newest one that is not damaged."""
        return self._resumed[0]

    @property
    def saved(self) -> dict[str, Any]:
        """The contents of the checkpoint without its numbers; empty for a run that starts."""
        return self._resumed[1]

    @cached_property
    def _resumed(self) -> tuple[str | None, dict[str, Any]]:
        resume, folder = self.cfg.resume, self.folder / "checkpoints"
        if resume is True:
            raise UserError("resume=true: resume must be auto, the path of a checkpoint, or false")
        if not resume or (resume == "auto" and not checkpoints(folder)):
            return None, {}
        if resume != "auto" and not Path(resume).exists():
            raise UserError(
                f"resume={resume}: there is no such checkpoint. Use resume=auto for the run's last one, or false"
            )
        if self.cfg.strategy.name == "deepspeed":
            raise UserError(
                "strategy=deepspeed cannot resume: DeepSpeed unpickles its checkpoints, which would run code in them. "
                "Use resume=false to start a new run, or strategy=fsdp, which resumes."
            )
        path, content = find_checkpoint(folder) if resume == "auto" else (resume, read_checkpoint(Path(resume)))
        return str(path), content

    @property
    def samples_validation(self) -> bool:
        """Whether an evaluation samples responses to validation prompts."""
        return self.cfg.eval.enabled and not find(self.data.requirements, SequenceScores)

    @cached_property
    def validation_reward(self) -> Reward | None:
        """The reward of validation; None for the run's own."""
        return instantiate(self.cfg.eval.reward) if self.cfg.eval.reward else None

    def check_validation_prompts(self) -> None:
        """Raise UserError for validation prompts that cannot be written or scored, before training ones are sampled."""
        rows = self.data.training_set.validation
        if self.samples_validation and len(rows):
            check_prompts(self.annotator, rows, np.arange(len(rows)), warns=False)
            check_answers(self.validation_reward or self.annotator.reward, rows)

    def sample_validation(self) -> None:
        """Fill the cache with the reference's responses to the validation prompts and their rewards."""
        data = self.data.training_set
        if self.samples_validation and len(data.validation):
            sampling = Sampling(**self.cfg.eval.sampling)
            evaluate_reference(self.annotator, data.validation, sampling, self.validation_reward)

    def close(self, trainer: lightning.Trainer) -> None:
        """Finish the loggers, which would otherwise leak into the next job of a sweep."""
        for logger in trainer.loggers:
            logger.finalize("success")
        if self.cfg.logger.wandb:
            import wandb

            wandb.finish()
