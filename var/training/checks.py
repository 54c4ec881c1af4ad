"""Checks of a configuration as a whole, before anything is loaded."""

import importlib.util
import math
import os
from dataclasses import replace
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from var.config.run_files import read_run_config
from var.config.schema import TrainerSettings, pick_fields
from var.models.files import find_model
from var.models.lora import LoRA
from var.models.pretrained import Pretrained
from var.models.publish import explain_local_base
from var.utils.console import say, warn
from var.utils.errors import Problems, UserError, brief
from var.utils.extras import name_install


def locate_initial_model(cfg: DictConfig) -> Pretrained:
    """Return the model that the policy starts from, and that is the reference: that of init, or model.path."""
    model = Pretrained(**pick_fields(Pretrained, cfg.model), cache=cfg.cache)
    return model if cfg.init is None else model.at(str(find_model(cfg.init)), chat_template=None)


def check_adapter(cfg: DictConfig, pretrained: Pretrained, adapter: LoRA | None) -> None:
    """Raise UserError for what an adapter, or a model without one, cannot do."""
    problems, kind = Problems("the model cannot be trained"), pretrained.quantization
    if kind and adapter is None and not cfg.dry:
        problems.add("model.quantization", f"{kind} weights are frozen; set adapter=lora to train on top of them")
    if kind and cfg.strategy.name in ("fsdp", "deepspeed"):
        problems.add(
            "strategy",
            f"{cfg.strategy.name} does not shard quantized weights; strategy=ddp keeps a copy on each device",
        )
    pushes = OmegaConf.select(cfg, "export.push_to_hub")  # annotate.py has no such key
    if pushes and adapter and not adapter.merge and pretrained.location[1] is None:
        problems.add("export.push_to_hub", explain_local_base(pretrained.location[0]))
    problems.check()


def warn_of_other_arguments(model: Path, pretrained: Pretrained) -> None:
    """Warn if a run wrote the exported `model` with other arguments of the chat template than `pretrained` has."""
    before = read_run_config(model)["model"].get("chat_template_kwargs") or {}
    if before != (now := dict(pretrained.chat_template_kwargs or {})):
        warn(
            f"init: the model was trained with model.chat_template_kwargs={before}, and this command uses {now}. Give "
            "the same arguments, unless the prompts are meant to differ."
        )


def check_strategy(cfg: DictConfig, settings: TrainerSettings) -> None:
    """Raise UserError for what Lightning, the optimizer or the export cannot do with this strategy."""
    name, problems = cfg.strategy.name, Problems(f"strategy={cfg.strategy.name}")
    if name == "fsdp" and cfg.optim.optimizer._target_.endswith("MasterAdamW"):
        problems.add(
            "optim", "adamw_masters keeps complete copies, and fsdp shards float32 parameters; use optim=adamw with "
            "model.dtype=float32"
        )  # fmt: skip
    if name == "deepspeed":
        if importlib.util.find_spec("deepspeed") is None:
            problems.add("deepspeed", f"is not installed: {name_install('deepspeed')}")
        if not settings.gpu:
            problems.add("trainer.accelerator", "must be gpu: DeepSpeed needs GPUs; strategy=fsdp also runs on CPUs")
        if cfg.strategy.stage not in (1, 2):
            problems.add("strategy.stage", f"must be 1 or 2, got {cfg.strategy.stage}; strategy=fsdp shards parameters")
    problems.check()


def check_seed(seed: int) -> None:
    """Raise UserError for a seed that torch and NumPy do not both accept."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed}: a seed must be at least 0 and below 2**32")


def check_optimizer(cfg: DictConfig) -> None:
    """Raise UserError for arguments that the optimizer rejects, such as a negative learning rate."""
    rate = cfg.optim.optimizer.get("lr", 0.0)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not math.isfinite(rate):
        raise UserError(
            f"optim.optimizer.lr, which is model.learning_rate unless it is set: expected a number, got {rate}"
        )
    try:
        instantiate(cfg.optim.optimizer, _convert_="all")([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        raise UserError(f"optim.optimizer cannot be built: {brief(error)}. Check its settings.") from error


def choose_devices(cfg: DictConfig, settings: TrainerSettings) -> TrainerSettings:
    """Return the settings with trainer.devices=auto resolved. Devices that a step has no micro-batch for stay idle."""
    if settings.devices != "auto" or "LOCAL_WORLD_SIZE" in os.environ:
        return settings
    useful = max(1, cfg.data.global_batch // cfg.data.micro_batch // settings.num_nodes)
    if useful < settings.local:
        say(
            f"trainer.devices=auto: {useful} of {settings.local} GPUs are used, because an optimizer step has "
            f"{useful * settings.num_nodes} micro-batches (data.global_batch={cfg.data.global_batch}, "
            f"data.micro_batch={cfg.data.micro_batch})."
        )
    return replace(settings, devices=min(useful, settings.local))


def count_accumulation(cfg: DictConfig, settings: TrainerSettings) -> int:
    """Return the micro-batches per optimizer step and rank. Raise UserError for sizes that do not work, with others.

    If the ranks do not divide a step's micro-batches, its last ones are padding (`Plan.batches`). So a step is the same
    on any number of ranks.
    """
    step, micro, world = cfg.data.global_batch, cfg.data.micro_batch, settings.world
    near = [size for size in range(1, step + 1) if step % size == 0 and step // size >= world]
    if step % micro:
        sizes = sorted({max(1, step // micro) * micro, (step // micro + 1) * micro})
        values = [f"data.global_batch={size}" for size in sizes]
        values += [f"data.micro_batch={min(near, key=lambda size: abs(size - micro))}"] if near else []
        raise UserError(
            f"data.global_batch={step} must be a multiple of data.micro_batch={micro}: an optimizer step has complete "
            f"micro-batches. The nearest values that work: {' or '.join(values)}."
        )
    window = step // micro
    if world > window:
        values = [f"data.global_batch={micro * world}"]
        values += [f"data.micro_batch={near[-1]}"] if near else []
        if window >= settings.num_nodes and "LOCAL_WORLD_SIZE" not in os.environ:  # otherwise a launcher chose
            values += [f"trainer.devices={window // settings.num_nodes}"]
        raise UserError(
            f"data.global_batch={step} has {window} micro-batches of data.micro_batch={micro}, fewer than the {world} "
            f"processes. The nearest values that work: {' or '.join(values)}."
        )
    return -(-window // world)


def check_ranks(settings: TrainerSettings) -> None:
    """Raise UserError if the launcher started more or fewer processes than the trainer expects.

    Surplus processes would each train alone, and with too few, the run would wait forever.
    """
    started = int(os.environ.get("WORLD_SIZE", settings.world))
    if started != settings.world:
        raise UserError(
            f"{started} processes were started, but trainer.devices={settings.local} times "
            f"trainer.num_nodes={settings.num_nodes} is {settings.world}. Set trainer.devices to the processes per "
            "machine (auto: as many as were started there) and trainer.num_nodes to the machines."
        )


def list_overrides() -> list[str]:
    """Return the overrides of this command line, except annotate= and debug=."""
    task = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return [override for override in task if not override.startswith(("annotate=", "debug="))]
