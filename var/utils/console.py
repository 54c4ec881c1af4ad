"""Terminal output of the first rank: lines, warnings and progress bars."""

import io
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from var.utils.visible import visible


class Terminal(Console):
    """A console that prints text literally: without markup such as [bold], emoji codes, and control characters."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the text of a line, or of the cell or the title of a table."""
        return super().render_str(visible(text), **options)


PACE = 30.0  # seconds between two lines of a log about the same stage
LOG_WIDTH = 100  # characters of tables in the log file

console = Terminal(soft_wrap=True, highlight=False, markup=False, emoji=False)
_label, _logs = "", True


def is_first_rank() -> bool:
    """Return whether this is the first process of the job."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0


def keep_log(keep: bool) -> None:
    """Set whether lines are written to the log file of the run. What trains nothing leaves none."""
    global _logs
    _logs = keep


def label_lines(label: str) -> None:
    """Begin each line with a label, as of one of several jobs at once, which then has no progress bars."""
    global _label
    _label = f"{label} " if label else ""


def shows_progress() -> bool:
    """Return whether there are progress bars, and not lines of a log."""
    return console.is_terminal and not _label


def say(text: str) -> None:
    """Print a line on the first rank, and write it to the log file of the run if there is one."""
    _say(text, logging.INFO)


def warn(text: str) -> None:
    """Print a warning on the first rank, and write it to the log file of the run if there is one."""
    _say(text, logging.WARNING)


def _say(text: str, level: int) -> None:
    if is_first_rank():
        console.print(f"{_label}{'Warning: ' if level == logging.WARNING else ''}{text}")
        _write_log(text, level)


def _write_log(text: str, level: int) -> None:
    if not _logs:
        return
    record = logging.LogRecord("var", level, __file__, 0, visible(text), None, None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def show(table: Table) -> None:
    """Print a table on the first rank, and write it to the log file of the run if there is one."""
    if not is_first_rank():
        return
    if _label:
        console.print(_label.rstrip())
    console.print(table)
    text = io.StringIO()
    Terminal(file=text, width=LOG_WIDTH).print(table)
    _write_log(f"\n{text.getvalue().rstrip()}", logging.INFO)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the duration of the `with` block to `seconds[name]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


@contextmanager
def stage(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on the first rank, and yield the function that advances it by a number of units.

    Without a terminal, print the title at the start, the time left every PACE seconds, and the duration at the end. If
    `total` is 0, print nothing.
    """
    if total == 0 or not is_first_rank():
        yield lambda done: None
        return
    if not shows_progress():
        say(f"{title}: {total} {unit}")
        started = time.monotonic()
        yield _measure_pace(title, total, unit)
        if (seconds := round(time.monotonic() - started)) > 0:
            say(f"{title}: {total} {unit} in {timedelta(seconds=seconds)}")
        return
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TextColumn(unit, markup=False),
    )  # fmt: skip
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(visible(title), total=total)
        yield lambda done: bar.advance(task, done)


def _measure_pace(title: str, total: int, unit: str) -> Callable[[int], None]:
    """Return a function that counts units, and prints the time left every PACE seconds.

    The clock starts after the first units, which may have waited for a model to be loaded.
    """
    count, first, printed = 0, (0, 0.0), 0.0

    def measure(done: int) -> None:
        nonlocal count, first, printed
        count, now = count + done, time.monotonic()
        if first[0] == 0:
            first, printed = (count, now), now
        elif now - printed >= PACE and count < total:
            left = (total - count) * (now - first[1]) / (count - first[0])
            say(f"{title}: {count} of {total} {unit}, about {timedelta(seconds=round(left))} left")
            printed = now

    return measure


def silence_libraries() -> None:
    """Turn off progress bars, advertisements and known harmless warnings of libraries."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("lightning.pytorch", "lightning.fabric", "httpx", "httpx2"):  # httpx prints each request to a hub
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a failure raises an error of ours
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*")  # names that transformers renames
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")  # short runs log the last step
