"""Settings of a data set: which responses train, how long, and how many per micro-batch."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from var.utils.errors import Problems

Responses = Literal["auto", "chosen", "both", "best", "all", "sampled"]
Overlong = Literal["drop", "truncate", "error"]
LastMicroBatch = Literal["drop", "keep", "error"]
LastStep = Literal["keep", "drop"]
OnTemplateChange = Literal["error", "count"]


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The settings that every data set has (conf/data/_base.yaml)."""

    responses: Responses
    """Which responses to train on. `auto`: pairs for a loss on pairs, otherwise all responses."""
    max_length: int
    """Tokens of prompt and response together."""
    overlong: Overlong
    """What to do with a longer sequence."""
    on_template_change: OnTemplateChange
    """What to do with rows that the chat template does not write as they are."""
    validation_prompts: int
    """Prompts on which the policy is evaluated and never trained."""
    limit: int | None
    """Number of rows to use, from the first; None for all."""
    sample: int | None = None
    """Number of prompts to draw from all rows; None for all. All rows with a drawn prompt are used."""
    micro_batch: int
    """B, in units: sequences, pairs, groups or, in an online run, prompts."""
    global_batch: int
    """Units per optimizer step, over all devices and accumulation."""
    last_micro_batch: LastMicroBatch
    """What to do with a last micro-batch of fewer than B units."""
    last_step: LastStep
    """What to do with a last optimizer step of fewer than global_batch units."""
    seed: int
    """The seed of the shuffle, of the validation split and of the draw of `sample`."""

    def __post_init__(self) -> None:
        problems = Problems("invalid data settings")
        choices = {
            "responses": Responses, "overlong": Overlong, "last_micro_batch": LastMicroBatch, "last_step": LastStep,
            "on_template_change": OnTemplateChange,
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                problems.add(
                    f"data.{name}", f"must be one of {', '.join(get_args(allowed))}, got {getattr(self, name)!r}"
                )
        for name in ("max_length", "micro_batch", "global_batch"):
            if getattr(self, name) < 1:
                problems.add(f"data.{name}", f"must be at least 1, got {getattr(self, name)}")
        if self.limit is not None and self.limit < 1:
            problems.add("data.limit", f"must be at least 1, or null for all rows, got {self.limit}")
        if self.sample is not None and self.sample < 1:
            problems.add("data.sample", f"must be at least 1, or null for all prompts, got {self.sample}")
        if self.sample is not None and self.limit is not None:
            problems.add("data.sample", "draws from all rows, and data.limit takes the first ones. Set one of them")
        if self.validation_prompts < 0:
            problems.add("data.validation_prompts", f"must be at least 0, got {self.validation_prompts}")
        problems.check()


@dataclass(frozen=True, kw_only=True)
class DataGroup(DataSettings):
    """A data group of the configuration: its settings, and the data set's name and adapter."""

    name: str
    """The name, for folders and tables."""
    source: Any
    """The adapter."""
