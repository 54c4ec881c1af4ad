"""Show text from data, models and servers as it is: its control characters must not act on the terminal."""

import logging
import re
import sys
from typing import Any

# C0 and C1 controls but for tab and line feed; line and paragraph separators; marks, embeddings, overrides and isolates
# of bidirectional text, which show characters in another order; and unpaired surrogates, which cannot be printed.
CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
# What libraries print to standard error: colors, and the carriage return of progress bars.
HARMLESS = re.compile("(\x1b\\[[0-9;]*m|\r)")


def visible(text: str) -> str:
    r"""Return a text with escapes in place of its control characters, such as \x1b and \u202e."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def protect_terminal() -> None:
    """Make control characters visible in log records, and in what is printed to standard error.

    Libraries log parts of answers, and tracebacks and warnings repeat parts of data. Standard output is written by
    `var.utils.console`.
    """
    if not isinstance(sys.stderr, _VisibleStream):
        sys.stderr = _VisibleStream(sys.stderr)  # type: ignore[assignment]
    if not isinstance(logging.getLogRecordFactory(), _Records):
        logging.setLogRecordFactory(_Records(logging.getLogRecordFactory()))


class _VisibleStream:
    """A text stream whose controls are visible, except colors and carriage returns."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text."""
        parts = HARMLESS.split(text)  # every second one is harmless
        self._stream.write("".join(part if i % 2 else visible(part) for i, part in enumerate(parts)))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Records:
    """Makes log records with a visible message and traceback, for all handlers."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __call__(self, *arguments: Any, **named: Any) -> logging.LogRecord:
        """Return a record."""
        record: logging.LogRecord = self.make(*arguments, **named)
        try:
            message = record.getMessage()
        except Exception:  # a wrong format, which its handler reports
            return record
        if (shown := visible(message)) != message:
            record.msg, record.args = shown, ()
        if record.exc_info and isinstance(record.exc_info, tuple) and record.exc_info[0]:
            record.exc_text = visible(logging.Formatter().formatException(record.exc_info))
        return record
