"""Align a language model: sample and annotate what is missing, train, evaluate, export. `python train.py --help`."""

import hydra
from omegaconf import DictConfig

from var.config.check import FOLDER, TRAIN, check
from var.config.entry import run_command
from var.utils.distributed import set_rank_variables


@hydra.main(version_base="1.3", config_path=FOLDER, config_name="train")
def main(cfg: DictConfig) -> float | None:
    """One run; returns the validation reward after training, for sweepers."""
    set_rank_variables()
    check(cfg, TRAIN, imports=False)

    import json
    import time
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from var.training import summary
    from var.utils.console import say

    folder = Path(HydraConfig.get().runtime.output_dir)
    if cfg.resume == "auto" and (folder / "summary.json").exists() and not cfg.dry:
        say(f"This very run is finished: {folder}. resume=false runs it anew, in another folder.")
        done = json.loads((folder / "summary.json").read_text())
        summary.show(done)
        summary.warn_of_newer_data(cfg, folder)
        return None if done["reward"] is None else float(done["reward"])

    from lightning import seed_everything

    from var.report.write import plot
    from var.training import dry_run as dry
    from var.training.run import Run

    run = Run.compose(cfg, folder)
    if cfg.dry:
        return dry.show(run)

    seed_everything(cfg.seed, verbose=False)
    trainer = run.trainer()
    try:
        module = run.module()
        begun = time.perf_counter()
        # its setup fills the store: see AlignmentData.prepare
        trainer.fit(module, run.data, ckpt_path=run.checkpoint, weights_only=True)
        report = run.report(trainer, time.perf_counter() - begun)
        run.export(trainer, module, report)
        if trainer.is_global_zero:
            plot([folder], folder / "plots" / "curves.png")
            summary.write(folder, report)  # last: it says that the run is finished
            summary.show(report)
    finally:
        run.close(trainer)  # after a failure too: a sweep's next job would log into this one's W&B run
    return None if report["reward"] is None else float(report["reward"])


if __name__ == "__main__":
    run_command(main)
