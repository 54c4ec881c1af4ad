"""What a run or a model is worth: rewards, lengths, KL, win rates, benchmarks: `python eval.py init=runs/…`."""

import hydra
from omegaconf import DictConfig

from var import config


@hydra.main(version_base="1.3", config_path=config.FOLDER, config_name="eval")
def main(cfg: DictConfig) -> None:
    """Everything that can be wrong is told first; then answers, their worth, and result.json with what it rests on."""
    config.check(cfg, config.EVAL, imports=False)

    from var.evaluate.build import Evaluation

    evaluation = Evaluation.compose(cfg)
    evaluation.check()
    evaluation.run()


if __name__ == "__main__":
    config.run(main, "eval")
