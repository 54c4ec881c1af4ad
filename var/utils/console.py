"""Terminal output of the first rank: lines, warnings and progress bars."""

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
from rich.text import Text

from var.utils.visible import visible


class Terminal(Console):
    """A console that prints text literally: without markup such as [bold], emoji codes, and control characters."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the text of a line, or of the cell or the title of a table."""
        return super().render_str(visible(text), **options)


PACE = 30.0  # seconds after which a log has the time that a stage will take

console = Terminal(soft_wrap=True, highlight=False, markup=False, emoji=False)


def is_first_rank() -> bool:
    """Return whether this is the first process of the job."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0


def say(text: str) -> None:
    """Print a line on the first rank."""
    if is_first_rank():
        console.print(text)


def warn(text: str) -> None:
    """Print a warning on the first rank, and write it to the log file of the run if there is one."""
    say(f"Warning: {text}")
    record = logging.LogRecord("var", logging.WARNING, __file__, 0, visible(text), None, None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


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

    Without a terminal, print the title at the start, the time left once, and the bar once at the end. If `total` is 0,
    print nothing.
    """
    if total == 0 or not is_first_rank():
        yield lambda done: None
        return
    if not console.is_terminal:
        say(f"{title}: {total} {unit}")
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TextColumn(unit, markup=False),
    )  # fmt: skip
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(visible(title), total=total)
        measure = (lambda done: None) if console.is_terminal else _measure_pace(title, total, unit)

        def advance(done: int) -> None:
            bar.advance(task, done)
            measure(done)

        yield advance


def _measure_pace(title: str, total: int, unit: str) -> Callable[[int], None]:
    """Return a function that counts units, and prints the time left when the pace has been measured for PACE seconds.

    The clock starts after the first units, which may have waited for a model to be loaded.
    """
    count, first, printed = 0, (0, 0.0), False

    def measure(done: int) -> None:
        nonlocal count, first, printed
        count, now = count + done, time.monotonic()
        if first[0] == 0:
            first = count, now
        elif not printed and now - first[1] >= PACE and count < total:
            left = (total - count) * (now - first[1]) / (count - first[0])
            say(f"{title}: {count} of {total} {unit}, about {timedelta(seconds=round(left))} left")
            printed = True

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
