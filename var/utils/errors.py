"""Errors that a user can fix, collected and raised together before the first expensive step."""

from collections.abc import Callable
from typing import Any


class UserError(ValueError):
    """An error that the user can fix. The commands print its message without a traceback."""


class UnavailableError(UserError):
    """A model or a data set is not on this machine and cannot be downloaded."""


def brief(error: BaseException) -> str:
    """Return the message of an error on one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


def check_all(*checks: Callable[[], Any]) -> None:
    """Run all checks, and raise one `UserError` with the messages of those that raise one, directly or as a cause."""
    found: list[UserError] = []
    for check in checks:
        try:
            check()
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, UserError):
                cause = cause.__cause__
            if cause is None:
                raise
            found.append(cause)
    if len(found) == 1:
        raise found[0]
    if found:
        raise UserError("\n".join(map(str, found)))


class Problems:
    """Collect problems, and raise one `UserError` with a title, the first `shown` problems and the number of others."""

    def __init__(self, title: str, shown: int = 20) -> None:
        self.title, self.shown, self.found = title, shown, list[str]()

    def __bool__(self) -> bool:
        return bool(self.found)

    @property
    def count(self) -> int:
        """The number of problems."""
        return len(self.found)

    def add(self, where: str, what: str) -> None:
        """Add a problem. `where` names the key, file or row."""
        self.found.append(f"{where}: {what}")

    def check(self, advice: str = "") -> None:
        """Raise a `UserError` if there are problems. `advice` becomes the last line of its message."""
        if not self.found:
            return
        lines = [f"{self.title} ({self.count}):", *(f"  {line}" for line in self.found[: self.shown])]
        if len(self.found) > self.shown:
            lines.append(f"  … and {len(self.found) - self.shown} more")
        if advice:
            lines.append(advice)
        raise UserError("\n".join(lines))
