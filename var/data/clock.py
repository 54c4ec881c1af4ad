"""The date that chat templates read: one for a whole run, also if it resumes on another day."""

from datetime import date, datetime
from pathlib import Path

from var.utils.console import is_first_rank
from var.utils.errors import UserError
from var.utils.files import atomic

CLOCK = "strftime_now"  # the function with which a template reads the clock

_today: date | None = None  # what `fix_today` sets
_file: Path | None = None  # to be written when a template reads the date


def fix_today(file: Path | None, keep: bool = False) -> date:
    """Set what templates of this process read as the current date, and return it: the date in a file, or today's.

    keep: write the file when a template reads the date, for the next start of the run.
    """
    global _today, _file
    known = file is not None and file.exists()
    try:
        _today = date.fromisoformat(file.read_text()) if file is not None and known else date.today()
    except ValueError as error:
        raise UserError(f"{file}: expected a date such as 2024-07-26. Remove the file to use today's.") from error
    _file = file if keep and not known and is_first_rank() else None
    return _today


def read_date(value: str | None, key: str = "model.date") -> date:
    """Return the date in a setting or, if it is None, the current one (`fix_today`)."""
    try:
        return (_today or date.today()) if value is None else date.fromisoformat(str(value))
    except ValueError as error:
        raise UserError(f"{key}: expected a date such as 2024-07-26, got {value!r}") from error


def set_clock(source: str, today: date) -> None:
    """Set the date that a template reads, if it reads one.

    A function among its arguments would not reach the template, which transformers compiles once per process.
    """
    from transformers.utils import chat_template_utils

    global _file
    if CLOCK not in source:
        return
    if _file is not None and today == _today:
        with atomic(_file, shared=True) as content:
            content.write(today.isoformat())
        _file = None
    clock = datetime(today.year, today.month, today.day).strftime
    chat_template_utils._compile_jinja_template(source).globals[CLOCK] = clock
