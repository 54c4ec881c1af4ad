"""What chat templates change of rows: counted, listed with examples, and an error unless it is accepted."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from var.data.settings import OnTemplateChange
from var.utils.console import warn
from var.utils.errors import Problems

SHOWN = 3  # examples in a warning

ADVICE = (
    "In a difference, [-…-] is missing and {+…+} is added. Set model.chat_template to a template that keeps the text, "
    "or model.chat_template_kwargs to its arguments. data.on_template_change=count trains on what it writes."
)


@dataclass
class TemplateChanges:
    """Rows that a chat template changes."""

    found: list[tuple[str, str]] = field(default_factory=list)
    """(row, change)."""
    rows: int = 0
    """How many rows."""

    def add(self, where: str, changes: Sequence[str]) -> None:
        """Add the changes of one row."""
        self.rows += bool(changes)
        self.found += [(where, change) for change in changes]

    def settle(self, setting: OnTemplateChange) -> None:
        """Raise one UserError for all changes, or warn with the first ones if they are accepted."""
        if setting == "error":
            problems = Problems("the chat template does not write these rows as they are")
            for where, change in self.found:
                problems.add(where, change)
            problems.check(ADVICE)
        elif self.rows:
            examples = "; ".join(f"{where}: {change}" for where, change in self.found[:SHOWN])
            warn(f"the chat template changes {self.rows} rows, which train as it writes them. {examples}")
