"""Sample and reward a model's responses to the data's prompts: `python sample.py init=runs/… out=rows.jsonl`."""

import var.config.installed  # isort: skip  # noqa: F401  before what may be missing

from var.commands.sample import command

if __name__ == "__main__":
    command()
