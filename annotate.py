"""Fill the annotation cache before training, with train.py's configuration: `python annotate.py loss=var data=…`."""

import var.config.installed  # isort: skip  # noqa: F401  before what may be missing

from var.commands.annotate import command

if __name__ == "__main__":
    command()
