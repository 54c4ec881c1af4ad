"""From a checked configuration to the parts of a run."""

import gc
import importlib.util
import logging
import os
import shlex
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.callbacks import RichModelSummary, RichProgressBar
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.profilers import PyTorchProfiler, SimpleProfiler
from omegaconf import DictConfig, OmegaConf
from torch.distributed.fsdp import FSDPModule

from var.annotate.annotator import Annotator
from var.annotate.cache import AnnotationCache
from var.config.check import TRAIN, check
from var.config.schema import EvalSettings, TrainerSettings, pick_fields, to_dict
from var.data.settings import DataSettings
from var.models.export import export
from var.models.frozen import AdapterOff, FrozenModel
from var.models.lora import LoRA, merged
from var.models.policy import Policy
from var.models.pretrained import Pretrained, find_model
from var.models.reward_model import RewardModel
from var.models.value_head import ActorCritic
from var.requirements import Need
from var.rewards.scale import Scale
from var.sampling.base import Sampling
from var.training import summary
from var.training.checkpoints import Checkpoints, DirectCheckpointIO, check_checkpoint, check_disk_space, checkpoints
from var.training.datamodule import AlignmentData
from var.training.loggers import Curves, PlanFile, loggers
from var.training.metrics import Budget, StepMetrics
from var.training.module import AlignmentModule
from var.training.validation import PairAccuracy, Validation
from var.utils.console import console, say, warn
from var.utils.errors import Problems, UserError
from var.utils.provenance import environment

PROFILERS: dict[str, Any] = {
    "simple": lambda folder: SimpleProfiler(folder, "profile"),
    "pytorch": lambda folder: PyTorchProfiler(folder, "profile"),
}


PRECISIONS = {"32-true": None, "64-true": None, "bf16-mixed": torch.bfloat16}


@dataclass
class Run:
    """The parts of one run."""

    cfg: DictConfig
    folder: Path
    pretrained: Pretrained
    adapter: LoRA | None
    annotator: Annotator
    data: AlignmentData
    settings: TrainerSettings

    @classmethod
    def compose(cls, cfg: DictConfig, folder: Path) -> "Run":
        """Check the configuration as a whole, then build what is light: no model is loaded."""
        silence_libraries()
        check(cfg, TRAIN)
        settings = TrainerSettings(**cfg.trainer)
        EvalSettings(**cfg.eval)
        if not 0 <= cfg.seed < 2**32:
            raise UserError(f"seed={cfg.seed}: a seed is at least 0 and below 2**32")
        if is_multirun():
            gc.collect()  # of the job before: its trainer and its model refer to each other
        check_multirun(settings.world)
        check_ranks(settings)
        if cfg.dry and cfg.annotate == "error":
            raise UserError("debug=dry computes nothing, so annotate=error does nothing beside it")
        pretrained = Pretrained(**pick_fields(Pretrained, cfg.model), cache=cfg.cache)
        if cfg.init is not None:
            pretrained = replace(pretrained, path=str(find_model(cfg.init)), revision=None, chat_template=None)
        adapter = instantiate(cfg.adapter) if cfg.adapter else None
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if settings.gpu else "cpu"
        annotator = Annotator(
            store=AnnotationCache(Path(cfg.annotation_cache).expanduser(), warn=warn),
            reference=FrozenModel(pretrained, device, PRECISIONS[settings.arithmetic]),
            reward=instantiate(cfg.reward),
            cache=Path(cfg.cache).expanduser(),
            sampler=instantiate(cfg.sampler),
            annotate=cfg.annotate,
            command=shlex.join(["python", "annotate.py", *overrides()]),
            dry=cfg.dry,
        )
        data = AlignmentData(
            source=instantiate(cfg.data.source),
            settings=DataSettings(**pick_fields(DataSettings, cfg.data)),
            loss=instantiate(cfg.loss),
            annotator=annotator,
            sampling=Sampling(**cfg.generate),
            scale=Scale(kind=cfg.reward_scale),
            live=cfg.reference == "live",
        )
        check_adapter(cfg, pretrained, adapter, data.loss.needs)
        accumulation(cfg, settings)
        return cls(cfg, folder, pretrained, adapter, annotator, data, settings)

    def module(self) -> AlignmentModule:
        """The policy, loaded and ready to train, with its loss."""
        cfg, needs, pretrained = self.cfg, self.data.loss.needs, self.pretrained
        scorer = Need.SCALAR_HEAD in needs
        if self.adapter and (pretrained.quantization or not self.adapter.merge) and pretrained.base is not None:
            raise UserError(f"adapter: {pretrained.folder} is one itself; start from what adapter.merge=true exported")
        # a reward model's new head, and an adapter, are in no file
        meta = cfg.strategy.name == "fsdp" and self.adapter is None and pretrained.base is None and not scorer
        model = (pretrained.empty if meta else pretrained.load_scorer if scorer else pretrained.load)()
        if meta and not pretrained.fills(model):
            warn("strategy=fsdp: the model's files name its weights otherwise, so each process loads all of it first")
            meta, model = False, pretrained.load()
        if self.adapter is not None:
            model = self.adapter.attach(model, pretrained)
        policy: Policy | ActorCritic | RewardModel = RewardModel(model.train()) if scorer else Policy(model.train())
        if Need.VALUES in needs:
            policy = ActorCritic(policy)  # type: ignore[arg-type]
        reference: Policy | AdapterOff | None = None
        if self.adapter is not None and not isinstance(policy, RewardModel):
            self.annotator.reference.is_under(policy)
        if cfg.reference == "live":
            if self.adapter is not None:
                reference = self.annotator.reference.policy
            else:
                reference = Policy(self.pretrained.load()).eval().requires_grad_(False)
        module = AlignmentModule(
            policy, self.data.loss, instantiate(cfg.optim.optimizer), instantiate(cfg.optim.schedule), reference,
            self.settings.nonfinite, self.pretrained.fill if meta else None,
        )  # fmt: skip
        if self.settings.arithmetic == "64-true":
            module = module.double()
        check_disk_space(self.folder, module)
        return module

    def trainer(self) -> lightning.Trainer:
        cfg, settings = self.cfg, self.settings
        reward = instantiate(cfg.eval.reward) if cfg.eval.reward else None
        sampling = Sampling(**cfg.eval.sampling)
        self.validation: Validation | PairAccuracy = PairAccuracy()
        judge = instantiate(cfg.eval.judge) if cfg.eval.judge else None
        if judge:
            judge.check()
        if Need.SCALAR_HEAD not in self.data.loss.needs:
            self.validation = Validation(
                sampling, cfg.eval.every_n_steps, reward, judge, cfg.eval.judged, self.annotator, self.folder
            )
        elif judge:
            raise UserError("eval.judge compares answers, and a reward model gives none")
        self.steps = StepMetrics(settings.ess_warning)
        budget = [Budget(settings.max_seconds)] if settings.max_seconds is not None else []
        saving = Checkpoints(self.folder / "checkpoints", settings.checkpoint_every_n_steps)
        # a step is saved before it is judged: a run that is told to leave while it is judged has it
        callbacks: list[Any] = [self.steps, *budget, saving, PlanFile(self.folder), self.validation]
        if console.is_terminal:
            callbacks += [RichProgressBar(), RichModelSummary(max_depth=1)]
        strategy = cfg.strategy.name
        check_strategy(cfg, settings)
        if "_target_" in cfg.strategy:
            extra = {"data_parallel_size": settings.world, "tensor_parallel_size": 1} if strategy == "fsdp" else {}
            options = {k: v for k, v in cfg.strategy.items() if k != "name"}
            strategy = instantiate(OmegaConf.create(options), **extra)
        return lightning.Trainer(
            accelerator="gpu" if settings.gpu else "cpu",
            devices=settings.local,
            num_nodes=settings.num_nodes,
            strategy=strategy,
            # the module is double itself; Lightning's 64-true would convert the batch, and refuses a frozen one
            precision="32-true" if settings.arithmetic == "64-true" else settings.arithmetic,  # type: ignore[arg-type]
            max_epochs=settings.epochs,
            max_steps=settings.max_steps,
            accumulate_grad_batches=accumulation(cfg, settings),
            gradient_clip_val=settings.gradient_clip or None,
            log_every_n_steps=settings.log_every_n_steps,
            logger=[Curves(self.folder / "metrics.csv", fresh=self.checkpoint is None), *loggers(cfg, self.folder)],
            callbacks=callbacks,
            # SLURM's signals are Checkpoints': Lightning's own would save in the middle of a step
            plugins=[
                DirectCheckpointIO(),
                *([SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []),
            ],
            profiler=PROFILERS[settings.profiler](self.folder) if settings.profiler else None,
            default_root_dir=self.folder,
            enable_checkpointing=False,  # Lightning's; ours is a callback
            enable_progress_bar=console.is_terminal,
            enable_model_summary=console.is_terminal,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
        )

    @cached_property
    def checkpoint(self) -> str | None:
        """Where to go on from: what resume says, or this folder's last checkpoint."""
        resume = self.cfg.resume
        if resume == "auto":
            whole = checkpoints(self.folder / "checkpoints")
            if whole:
                say(f"Going on from {whole[-1].resolve()}")
            return str(whole[-1]) if whole else None
        if resume is True:
            raise UserError("resume is auto, a checkpoint's path, or false")
        if resume and not Path(resume).exists():
            raise UserError(f"resume={resume}: there is no such checkpoint")
        if resume:
            check_checkpoint(Path(resume))
        return str(resume) if resume else None

    def report(self, trainer: lightning.Trainer, seconds: float) -> dict[str, Any]:
        """summary.json: what came out and what it depends on."""
        data, result = self.data, self.validation.result
        before, after = result.get("before"), result.get("after")
        validation: dict[str, Any] = {}
        if before and after:
            validation = {name: {"before": before[name], "after": after[name]} for name in before}
            if "kl" in result:
                validation["kl"] = result["kl"]
                validation["reward"]["gain"] = result.get("gain")
                validation["win_rate"] = result.get("win_rate")
                validation["judge"] = result.get("judge")
        outcome = validation.get("reward") or validation.get("accuracy")
        training = self.steps.seconds + self.steps.waited - data.seconds_of_rollouts
        name = f"{self.cfg.model.name}, {self.cfg.data.name}, {HydraConfig.get().runtime.choices.get('loss')}"
        return {
            "title": name,
            "folder": str(self.folder),
            "reward": outcome["after"]["mean"] if outcome and outcome["after"] else None,
            "validation": validation,
            "kl": validation.get("kl"),
            "length": validation.get("length"),
            "steps": trainer.global_step,
            "skipped_steps": trainer.lightning_module.skipped,
            "tokens_per_second": self.steps.tokens_per_second * trainer.world_size,
            "ess": data.facts.get("weights", {}).get("ess"),
            "data": data.facts,
            "computed": self.annotator.computed,
            "seconds_of_stages": self.annotator.seconds,
            "seconds": {
                "annotating": data.seconds + data.seconds_of_rollouts,
                "training": training,
                "evaluating": max(0.0, seconds - training - data.seconds - data.seconds_of_rollouts),
            },
            "hashes": {
                "plan": data.plan.hash,
                "weights": self.pretrained.weights,
                "sequences": data.content,
            },
            "seeds": {"run": self.cfg.seed, "data": self.cfg.data.seed, "sampling": self.cfg.generate.seed},
            "devices": trainer.world_size,
            "precision": self.settings.arithmetic,
            "config": to_dict(self.cfg),
            **environment(),
        }

    def export(self, trainer: lightning.Trainer, module: AlignmentModule, report: dict[str, Any]) -> None:
        """model/ in Hugging Face form; of a sharded model, gathered on the first rank."""
        state = None
        if isinstance(module.policy, FSDPModule):
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

            options = StateDictOptions(
                full_state_dict=True, cpu_offload=True, ignore_frozen_params=self.adapter is not None
            )
            state = get_model_state_dict(module.policy.model, options=options)
            if module.policy.model.config.tie_word_embeddings:  # gathered apart, they are one tensor in the file
                for name in module.policy.model._tied_weights_keys or ():
                    state.pop(name, None)
        if not trainer.is_global_zero:
            return
        validation = report["validation"]

        def cell(name: str, when: str) -> str:
            return summary.told(validation[name][when])

        labels = {
            "reward": "validation reward",
            "length": "response length, tokens",
            "accuracy": "accuracy on held-out pairs",
        }
        table = "\n".join(
            f"| {label} | {cell(name, 'before')} | {cell(name, 'after')} |"
            for name, label in labels.items()
            if name in validation
        )
        choices = HydraConfig.get().runtime.choices
        card = {
            "base": self.cfg.init or self.cfg.model.path, "name": self.folder.name, "loss": choices.get("loss"),
            "doc": type(module.loss).__module__, "version": version("var-align"), "table": table,
            "data": self.cfg.data.name, "plan": self.data.plan.hash, "reward": choices.get("reward"),
            "steps": report["steps"], "seed": self.cfg.seed,
        }  # fmt: skip
        model, chat, target = module.policy.model, self.pretrained.chat, self.folder / "model"
        merge = self.adapter is not None and self.adapter.merge
        export(model, chat, self.folder / "adapter" if merge else target, card, state)
        if merge:
            plain = replace(self.pretrained, quantization=None, compile=False)
            scorer = isinstance(module.policy, RewardModel)
            whole = merged(plain.load_scorer() if scorer else plain.load(), self.folder / "adapter")
            if scorer:
                whole.score.load_state_dict(model.score.state_dict())
            export(whole, chat, target, card)
        OmegaConf.save(self.cfg, target / "config.yaml", resolve=True)

    def validation_answers(self) -> None:
        """The reference's answers on the held-out prompts, which an evaluation before training reads."""
        if len(self.data.validation) and Need.SCALAR_HEAD not in self.data.loss.needs:
            sampling = Sampling(**self.cfg.eval.sampling)
            self.annotator.here.sampled(self.data.validation, sampling, "Evaluating the start")

    def close(self, trainer: lightning.Trainer) -> None:
        """Finish what would leak into the next job of a sweep."""
        for logger in trainer.loggers:
            logger.finalize("success")
        if self.cfg.logger.wandb:
            import wandb

            wandb.finish()


def silence_libraries() -> None:
    """Libraries' own bars and advertisements; warnings stay."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what fails is an error of ours, told once
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft asks transformers by an old name
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def check_adapter(cfg: DictConfig, pretrained: Pretrained, adapter: LoRA | None, needs: frozenset[Need]) -> None:
    """What an adapter, or a model without one, cannot do: told before anything is loaded."""
    problems, kind = Problems("the model cannot be trained so"), pretrained.quantization
    if kind and adapter is None and not cfg.dry:
        problems.add("model.quantization", f"{kind} weights stand still; train adapter=lora on them")
    if kind and cfg.strategy.name in ("fsdp", "deepspeed"):
        problems.add("strategy", f"{cfg.strategy.name} shards no quantised weights; strategy=ddp has a copy a device")
    if adapter is not None and Need.SCALAR_HEAD in needs and not adapter.merge:
        problems.add("adapter.merge", "a reward model's head is no part of its adapter; adapter.merge=true")
    problems.check()


def check_strategy(cfg: DictConfig, settings: TrainerSettings) -> None:
    """What Lightning or the optimiser would refuse when the store is filled, and what the export does not gather."""
    name, problems = cfg.strategy.name, Problems(f"strategy={cfg.strategy.name}")
    if name == "fsdp" and cfg.optim.optimizer._target_.endswith("MasterAdamW"):
        problems.add(
            "optim", "adamw_masters keeps whole copies, and here parameters are float32 shards; optim=adamw with "
            "model.dtype=float32"
        )  # fmt: skip
    if name == "deepspeed":
        if importlib.util.find_spec("deepspeed") is None:
            problems.add("deepspeed", "an extra: pip install -e '.[deepspeed]'")
        if not settings.gpu:
            problems.add("trainer.accelerator", "DeepSpeed runs on GPUs; strategy=fsdp runs on CPUs too")
        if cfg.strategy.stage not in (1, 2):
            problems.add("strategy.stage", f"{cfg.strategy.stage} is none of 1, 2; strategy=fsdp shards parameters")
    problems.check()


def accumulation(cfg: DictConfig, settings: TrainerSettings) -> int:
    """Micro-batches of one optimiser step on one rank."""
    per_rank, rest = divmod(cfg.data.global_batch, cfg.data.micro_batch * settings.world)
    if rest or not per_rank:
        raise UserError(
            f"data.global_batch={cfg.data.global_batch} must be a multiple of data.micro_batch={cfg.data.micro_batch} "
            f"times {settings.world} processes, so that a step is the same on any number of them"
        )
    return per_rank


def is_multirun() -> bool:
    """Whether this run is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def check_multirun(world: int) -> None:
    """Lightning would start each rank of a job with the whole sweep's command line (ashleve/lightning-hydra-template
    #393, Lightning-AI/pytorch-lightning #11300)."""
    if is_multirun() and world > 1 and "SUBMITIT_EXECUTOR" not in os.environ:
        raise UserError(
            f"-m with {world} processes a job: each of them would start the whole sweep again. Launch the jobs with "
            f"hydra/launcher=submitit_local hydra.launcher.tasks_per_node={world} (with GPUs: "
            f"hydra.launcher.gpus_per_node={world}), or one by one under torchrun"
        )


def check_ranks(settings: TrainerSettings) -> None:
    """Processes that a launcher started beyond the trainer's would each train alone, and missing ones be waited for."""
    started = int(os.environ.get("WORLD_SIZE", settings.world))
    if started != settings.world:
        raise UserError(
            f"{started} processes were started, and trainer.devices={settings.local} times "
            f"trainer.num_nodes={settings.num_nodes} is {settings.world}. trainer.devices is the processes of one "
            "machine (auto: as many as were started there), trainer.num_nodes the machines"
        )


def overrides() -> list[str]:
    """The overrides of this command line, for a command that is to do the same."""
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return [override for override in given if not override.startswith(("annotate=", "debug="))]
