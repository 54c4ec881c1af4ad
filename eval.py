"""Evaluate a run or a model: rewards, lengths, KL, win rates, benchmarks. Run `python eval.py init=runs/…`."""

import var.config.installed  # isort: skip  # noqa: F401  before what may be missing

from var.commands.eval import command

if __name__ == "__main__":
    command()
