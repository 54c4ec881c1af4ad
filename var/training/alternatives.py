"""Which strategy fits the devices of a run, and what fits instead if none does."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from var.config.check import FOLDER
from var.config.schema import TrainerSettings
from var.training.checks import count_accumulation
from var.training.memory import GIB, MemoryModel, Parts, device_memory, list_strategies, peak
from var.utils.errors import UserError

# Changes of a configuration that need less memory, in the order in which they are offered. More devices come first.
CHANGES = (
    ("model.gradient_checkpointing=true",),
    ("optim=adamw_masters", "model.dtype=bfloat16"),
    ("optim=adamw_masters", "model.dtype=bfloat16", "optim.optimizer.device=cpu"),
    ("adapter=lora", "model.learning_rate=1.0e-4"),
    ("adapter=lora", "model.learning_rate=1.0e-4", "model.dtype=bfloat16"),
    ("adapter=lora", "model.learning_rate=1.0e-4", "model.dtype=bfloat16", "model.quantization=nf4"),
    ("data.max_length=512",),
)
OFFERED = 4


@dataclass(frozen=True)
class MemoryPlan:
    """A strategy for a number of devices, and what it needs."""

    strategy: str
    """`single`, `ddp`, `fsdp` or `deepspeed`."""
    devices: int
    """The number of devices."""
    memory: float | None
    """Bytes of each device; None on a CPU."""
    stages: Mapping[str, Parts]
    """Bytes per device by stage and by what they hold."""
    shard_reference: bool = False
    """Whether the reference is sharded too, because a complete one does not fit on each device."""
    gather: bool = True
    """Whether a sharded policy is gathered to sample from it. Otherwise each layer is, for each token."""

    @property
    def needed(self) -> float:
        """Bytes per device of the largest stage, with the margin."""
        return peak(self.stages)

    @property
    def fits(self) -> bool:
        """Whether every stage fits. A CPU's memory is not checked."""
        return self.memory is None or self.needed <= self.memory


def plan_memory(cfg: DictConfig, settings: TrainerSettings) -> MemoryPlan:
    """Return the first strategy that fits, of strategy=auto, or the one that is set. If none fits, the last one."""
    model, memory = MemoryModel.of(cfg, settings), device_memory(settings)
    names = [cfg.strategy.name] if cfg.strategy.name != "auto" else list(list_strategies(model, settings.world))
    plan = None
    for name in names:
        for shard, gather in ((False, True), (True, True), (True, False)) if name == "fsdp" else ((False, True),):
            stages = model.stages(name, settings.world, shard_reference=shard, gather=gather)
            plan = MemoryPlan(name, settings.world, memory, stages, shard, gather)
            if plan.fits:
                return plan
    assert plan is not None
    return plan


def choose_strategy(cfg: DictConfig, settings: TrainerSettings) -> tuple[DictConfig, MemoryPlan | None]:
    """Return the configuration with strategy=auto resolved, and the memory plan of a run on GPUs."""
    plan = plan_memory(cfg, settings) if settings.gpu else None
    name = cfg.strategy.name
    if name == "auto" and settings.world > 1:
        name = plan.strategy if plan else "ddp"
        cfg = cfg.copy()
        cfg.strategy = OmegaConf.load(Path(FOLDER, "strategy", f"{name}.yaml"))
    return cfg, plan


def check_memory(cfg: DictConfig, settings: TrainerSettings, plan: MemoryPlan | None) -> None:
    """Raise UserError if the plan does not fit, with alternatives that do."""
    if plan is None or plan.fits:
        return
    assert plan.memory is not None
    stage = max(plan.stages, key=lambda name: sum(plan.stages[name].values()))
    lines = [
        f"trainer.device_memory: {plan.devices} × {plan.memory / GIB:.0f} GiB are not enough. strategy={plan.strategy} "
        f"needs {plan.needed / GIB:.1f} GiB per device in its largest stage, {stage}."
    ]
    found = list(list_alternatives(cfg, settings))
    if found:
        lines.append("These fit; add one of them to the command:")
        lines += [
            f"  {' '.join(words)}    # {needed / GIB:.1f} GiB per device, {name}" for words, needed, name in found
        ]
    else:
        lines.append("Use larger or more devices, or a smaller model.")
    lines.append("debug=dry shows the parts of each stage.")
    raise UserError("\n".join(lines))


def list_alternatives(cfg: DictConfig, settings: TrainerSettings) -> Iterator[tuple[list[str], float, str]]:
    """Yield changes of the command that fit: their overrides, bytes per device, and the strategy."""
    if not HydraConfig.initialized():
        return
    hydra = HydraConfig.get()
    given = [word for word in hydra.overrides.task if not word.startswith(("debug=", "hydra."))]
    more = [(f"trainer.devices={n}",) for n in (2, 4, 8) if n > settings.local and settings.devices != "auto"]
    offered = 0
    for words in [*more, *CHANGES]:
        if words in more and offered:  # the smallest number of devices that fits
            continue
        changed = {word.partition("=")[0] for word in words}
        kept = [word for word in given if word.partition("=")[0] not in changed]
        try:
            other = compose(hydra.job.config_name, [*kept, *words])
            devices = replace(settings, devices=other.trainer.devices if words in more else settings.devices)
            count_accumulation(other, devices)
            plan = plan_memory(other, devices)
        except UserError:
            continue
        if plan.fits:
            yield list(words), plan.needed, f"strategy={plan.strategy}" if plan.devices > 1 else "one device"
            offered += 1
            if offered == OFFERED:
                return


def describe_stages(plan: MemoryPlan) -> list[str]:
    """Return a line per stage with its parts."""
    lines = []
    for name, parts in plan.stages.items():
        shown: list[Any] = [f"{part} {size / GIB:.2f}" for part, size in parts.items() if size >= GIB / 1000]
        lines.append(f"  {name}: {sum(parts.values()) / GIB:.2f} GiB ({', '.join(shown)})")
    return lines
