"""The date that chat templates read: one for a whole run, also if it resumes on another day."""

from datetime import date, datetime
from pathlib import Path

from var.utils.errors import UserError

CLOCK = "strftime_now"  # the function with which a template reads the clock

_today: date | None = None  # what `fix_today` sets


def fix_today(file: Path | None) -> date:
    """Set what templates of this process read as the current date, and return it: the date in a file, or today's."""
    global _today
    try:
        _today = date.fromisoformat(file.read_text()) if file is not None and file.exists() else date.today()
    except ValueError as error:
        raise UserError(f"{file}: expected a date such as 2024-07-26. Remove the file to use today's.") from error
    return _today


def read_date(value: str | None, key: str = "model.date") -> date:
    """Return the date in a setting or, if it is None, the current one (`fix_today`)."""
    try:
        return (_today or date.today()) if value is None else date.fromisoformat(str(value))
    except ValueError as error:
        raise UserError(f"{key}: expected a date such as 2024-07-26, got {value!r}") from error


def set_clock(source: str, today: date) -> None:
    """Set the date that a template reads.

    A function among its arguments would not reach the template, which transformers compiles once per process.
    """
    from transformers.utils import chat_template_utils

    clock = datetime(today.year, today.month, today.day).strftime
    chat_template_utils._compile_jinja_template(source).globals[CLOCK] = clock
