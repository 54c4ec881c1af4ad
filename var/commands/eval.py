"""Evaluate a run or a model: rewards, lengths, KL, win rates, benchmarks. Run `python eval.py init=runs/…`."""

import var.config.installed  # isort: skip  # noqa: F401  before what may be missing

import hydra
from omegaconf import DictConfig

from var.config.check import EVAL, FOLDER, check
from var.config.entry import run_command
from var.utils.distributed import set_rank_variables


@hydra.main(version_base="1.3", config_path=FOLDER, config_name="eval")
def main(cfg: DictConfig) -> None:
    """Validate everything, then sample and score on all devices, and write result.json with its provenance."""
    set_rank_variables()
    check(cfg, EVAL, imports=False)

    from var.evaluate.devices import count_processes, join_processes, launch
    from var.evaluate.run import Evaluation
    from var.utils.console import console

    if (processes := count_processes(cfg)) > 1:
        with console.capture():  # errors are raised here, once; the processes print everything else
            Evaluation.compose(cfg).check()
        launch(processes)
        return
    join_processes()
    evaluation = Evaluation.compose(cfg)
    evaluation.check()
    evaluation.run()


def command() -> None:
    """Run the command line."""
    run_command(main)


if __name__ == "__main__":
    command()
