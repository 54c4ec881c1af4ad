"""Align a language model: sample and annotate what is missing, train, evaluate, export. `python train.py --help`."""

import var.config.installed  # isort: skip  # noqa: F401  before what may be missing

from var.commands.train import command

if __name__ == "__main__":
    command()
