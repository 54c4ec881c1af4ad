"""Compare runs and evaluations in tables, figures and one page per run: `python report.py runs/a runs/b …`."""

import var.config.installed  # isort: skip  # noqa: F401  before what may be missing

from var.commands.report import command

if __name__ == "__main__":
    command()
