"""Align a language model: sample and annotate what is missing, train, evaluate, export. `python train.py --help`."""

import hydra
from omegaconf import DictConfig

from var import config


@hydra.main(version_base="1.3", config_path=config.FOLDER, config_name="train")
def main(cfg: DictConfig) -> float | None:
    """One run; returns the validation reward after training, for sweepers."""
    config.name_rank()
    config.check(cfg, config.TRAIN, imports=False)

    import json
    import time
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from var import summary
    from var.progress import say

    folder = Path(HydraConfig.get().runtime.output_dir)
    if cfg.resume == "auto" and (folder / "summary.json").exists() and not cfg.dry:
        say(f"This very run is finished: {folder}. resume=false runs it anew, in another folder.")
        done = json.loads((folder / "summary.json").read_text())
        summary.show(done)
        summary.warn_of_newer_data(cfg, folder)
        return None if done["reward"] is None else float(done["reward"])

    from lightning import seed_everything

    from var import dry
    from var.build import Run
    from var.report.write import plot

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
    config.run(main, "train")
