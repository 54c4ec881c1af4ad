"""Evaluate a run or a model: rewards, lengths, KL, win rates, benchmarks. Run `python eval.py init=runs/…`."""

import hydra
from omegaconf import DictConfig

from var.config.check import EVAL, FOLDER, check
from var.config.entry import run_command


@hydra.main(version_base="1.3", config_path=FOLDER, config_name="eval")
def main(cfg: DictConfig) -> None:
    """Validate everything, then sample, score, and write result.json with its provenance."""
    check(cfg, EVAL, imports=False)

    from var.evaluate.run import Evaluation

    evaluation = Evaluation.compose(cfg)
    evaluation.check()
    evaluation.run()


if __name__ == "__main__":
    run_command(main)
