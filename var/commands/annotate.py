"""Fill the annotation cache before training, with train.py's configuration: `python annotate.py loss=var data=…`."""

import var.config.installed  # isort: skip  # noqa: F401  before what may be missing

import hydra
from omegaconf import DictConfig

from var.config.check import FOLDER, TRAIN, check
from var.config.entry import run_command
from var.utils.distributed import process_group, set_rank_variables
from var.utils.errors import UserError


@hydra.main(version_base="1.3", config_path=FOLDER, config_name="annotate")
def main(cfg: DictConfig) -> None:
    """Sample, score and annotate what this configuration's run needs, on all ranks of the launcher."""
    set_rank_variables()

    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    with open_dict(cfg):
        export = cfg.pop("export")
    check(cfg, TRAIN, imports=False)
    if not isinstance(export, str | DictConfig):
        raise UserError(f"export: expected the name of a file or a folder, got {export!r}")
    target = Path(export) if isinstance(export, str) else None

    from var.annotate.weights_file import check_text, check_weights_file, write_weights
    from var.config.saved import to_saved
    from var.training.run import Run
    from var.utils.console import say

    run = Run.compose(cfg, Path(HydraConfig.get().runtime.output_dir), trains=False)
    if target:
        check_weights_file(target, run.data.requirements, run.data.training_set.live)
    run.data.read_rows()
    if target:
        run.annotator.check_folders(export=target.parent)
        check_text(run.data.training_set.rows)
    run.data.tokenize()
    run.check_validation_prompts()
    with process_group(run.settings.timeout):
        run.data.setup()
        run.sample_validation()
        if target:
            count = write_weights(run.data.training_set, run.data.requirements, target, to_saved(cfg))
            say(f"Wrote {count} responses with weights to {target}.")
    if computed := run.annotator.computed:
        say("Computed: " + ", ".join(f"{count} {title.lower()}" for title, count in computed.items()) + ".")
    else:
        say("All annotations were cached; nothing to do.")


def command() -> None:
    """Run the command line."""
    run_command(main)


if __name__ == "__main__":
    command()
