"""What differs between the settings of a checkpoint and those of the command that resumes from it.

docs/gpus.md has the same table for readers.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from var.config.run_dir import DEVICES, ELSEWHERE
from var.config.saved import is_saved_form

# Nothing in the run depends on these keys, or another key that depends on them is compared.
SILENT = (
    *(ELSEWHERE - {"eval"}), *(f"trainer.{name}" for name in DEVICES), "trainer.accelerator", "trainer.device_memory",
    "model.learning_rate", "model.name", "model.repository", "model.architecture", "data.name", "data.path",
    r".+\.cache",
)  # fmt: skip
# Each is used from the first step after the checkpoint.
APPLIED = (
    r"trainer\..+", "optim.schedule", r"optim\.schedule\..+", "eval", r"eval\..+", "model.gradient_checkpointing",
    "data.on_template_change", "model.compile", "model.attention", "model.trust_remote_code",
    r"generate\.batch(_tokens)?",
    r".+\.client\.(base_url|api_key_env|concurrency|timeout|retries|price_in|price_out|max_cost)",
    r"reward\.(tokens|timeout|architecture)(\..+)?", r"sampler\.(gpu_memory_utilization|tensor_parallel_size)",
    r"strategy\.(gradient_as_bucket_view|save_distributed_checkpoint)",
)  # fmt: skip
# Strategies whose checkpoints hold complete states, for any number of devices.
COMPLETE = {"auto", "ddp"}
# They may have moved. The data module compares the plan and the weights with those of the checkpoint.
PLACES = ("data.source.path", "model.path", "model.revision", "init")
# Why a part of the configuration cannot change, by the start of its keys.
REASONS = {
    "optim": "the optimizer's state in the checkpoint does not fit another kind of optimizer",
    "loss": "one run has one objective",
    "adapter": "the checkpoint has the weights of its own adapter",
    "strategy": "the checkpoint is stored in the form of its own strategy",
    "model": "policy and reference start from one model",
    "seed": "the order of the data and the samples depend on it",
}
# What it means that a checkpoint of an earlier version lacks a key, if not null.
ABSENT = {"loss.roulette": False}
DATA = "what trains, in which order and how it is scored is fixed for a run"


@dataclass(frozen=True)
class Change:
    """A setting that differs."""

    key: str
    """The dotted key; that of a complete part if its class differs."""
    before: Any
    """The value with which the checkpoint was made; None if it had none."""
    after: Any
    """The value now."""

    def __str__(self) -> str:
        return f"{self.key} {self.show_values()}"

    def show_values(self) -> str:
        """Return the values before and after."""
        return f"{_show(self.before)} → {_show(self.after)}"

    @property
    def is_applied(self) -> bool:
        """Whether the new value is used, whatever the optimizer."""
        return _matches(self.key, APPLIED) or _matches(self.key, PLACES)

    @property
    def reason(self) -> str:
        """Why the value cannot change."""
        return REASONS.get(self.key.partition(".")[0], DATA)


def list_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Return the settings that differ and that a run depends on, in the order of the configuration."""
    changes = [change for change in compare("", before, after) if not _matches(change.key, SILENT)]
    names = {settings.get("strategy", {}).get("name") for settings in (before, after)}
    return [change for change in changes if change.key != "strategy" or not names <= COMPLETE]


def compare(path: str, before: Any, after: Any) -> Iterator[Change]:
    """Yield the settings that differ under a dotted key; "" for the complete configuration."""
    parts = isinstance(before, Mapping) and isinstance(after, Mapping)
    if parts and before.get("_target_") == after.get("_target_"):
        for key in dict.fromkeys((*before, *after)):
            name = f"{path}.{key}" if path else str(key)
            yield from compare(name, before.get(key, ABSENT.get(name)), after.get(key, ABSENT.get(name)))
    elif before != after and not is_saved_form(after, before):
        yield Change(path, before, after)


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(re.fullmatch(f"(?:{pattern})(\\..+)?", key) for pattern in patterns)


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("name") or value.get("_target_") or dict(value)).rpartition(".")[2]
    return "null" if value is None else str(value)
