"""Problems are collected and told all at once, before the first expensive step."""


class UserError(ValueError):
    """What the user can mend: an entry point prints its message without a traceback."""


def brief(error: BaseException) -> str:
    """What a library said, on one line of at most 300 letters."""
    return " ".join(str(error).split())[:300]


class Problems:
    """Collects problems, each with its place; `check` raises one UserError that tells them all."""

    def __init__(self, title: str, shown: int = 20) -> None:
        self.title, self.shown, self.found = title, shown, list[str]()

    def __bool__(self) -> bool:
        return bool(self.found)

    def add(self, where: str, what: str) -> None:
        self.found.append(f"{where}: {what}")

    def check(self, advice: str = "") -> None:
        if not self.found:
            return
        lines = [f"{self.title} ({len(self.found)}):", *(f"  {line}" for line in self.found[: self.shown])]
        if len(self.found) > self.shown:
            lines.append(f"  … and {len(self.found) - self.shown} more")
        if advice:
            lines.append(advice)
        raise UserError("\n".join(lines))
