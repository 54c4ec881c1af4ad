"""Settings of a data group."""

from dataclasses import dataclass
from typing import Any, Literal

from var.utils.errors import Problems


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """conf/data/_base.yaml has the meaning of each."""

    responses: Literal["auto", "chosen", "both", "best", "all", "sampled"]
    max_length: int
    overlong: Literal["drop", "truncate", "error"]
    validation_prompts: int
    limit: int | None
    micro_batch: int
    global_batch: int
    last_micro_batch: Literal["drop", "keep", "error"]
    last_step: Literal["keep", "drop"]
    seed: int

    def __post_init__(self) -> None:
        problems = Problems("data settings")
        choices = {
            "responses": ("auto", "chosen", "both", "best", "all", "sampled"),
            "overlong": ("drop", "truncate", "error"),
            "last_micro_batch": ("drop", "keep", "error"),
            "last_step": ("keep", "drop"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                problems.add(f"data.{name}", f"{getattr(self, name)!r} is none of {', '.join(allowed)}")
        for name in ("max_length", "micro_batch", "global_batch"):
            if getattr(self, name) < 1:
                problems.add(f"data.{name}", "must be at least 1")
        if self.validation_prompts < 0:
            problems.add("data.validation_prompts", "must be at least 0")
        problems.check()


@dataclass(frozen=True, kw_only=True)
class DataGroup(DataSettings):
    """A data group of the configuration: its settings, and the set's name and adapter."""

    name: str
    source: Any
