"""Align a language model: sample and annotate what is missing, train, evaluate, export. `python train.py --help`."""

import var.config.installed  # isort: skip  # noqa: F401  before what may be missing

from contextlib import nullcontext
from pathlib import Path

import hydra
from omegaconf import DictConfig

from var.config import sweep
from var.config.check import FOLDER, TRAIN, check
from var.config.entry import run_command
from var.utils.distributed import set_rank_variables
from var.utils.errors import UserError
from var.utils.signals import follow_first_rank


@hydra.main(version_base="1.3", config_path=FOLDER, config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Run the configuration. Return the validation reward after training, for sweepers."""
    set_rank_variables()
    follow_first_rank()
    check(cfg, TRAIN, imports=False)  # heavy libraries are imported only after it

    from hydra.core.hydra_config import HydraConfig

    from var.config.run_files import read_summary
    from var.models.publish import check_target
    from var.training import summary
    from var.utils.console import is_first_rank, keep_log, say
    from var.utils.files import remove
    from var.utils.locks import claim_folder

    folder, trains = Path(HydraConfig.get().runtime.output_dir), not (cfg.dry or cfg.show_rows)
    if cfg.export.push_to_hub and sweep.is_multirun():
        raise UserError("export.push_to_hub: the jobs of a sweep would replace each other. Push one finished run.")
    if cfg.resume == "auto" and (folder / "summary.json").exists() and trains:
        keep_log(False)
        finished = read_summary(folder)
        summary.check_same_settings(cfg, finished)
        say(f"Run already finished: {folder}. Use resume=false to start a new one.")
        summary.show(finished)
        summary.warn_of_newer_data(cfg, folder)
        summary.warn_of_other_weights(cfg, finished)
        summary.warn_of_other_evaluation(cfg, finished)
        if not cfg.trainer.keep_checkpoint and is_first_rank():  # a run can be killed before it does this
            remove(folder / "checkpoints")
        if cfg.export.push_to_hub and is_first_rank():
            check_target(cfg.export.push_to_hub)
        push(cfg, folder)
        return None if finished["reward"] is None else float(finished["reward"])
    if sweep.needs_process(cfg):
        return sweep.run_job(cfg, "var.commands.train")
    keep_log(trains)
    with claim_folder(folder, "trains in this folder") if is_first_rank() and trains else nullcontext():
        return train(cfg, folder)


def train(cfg: DictConfig, folder: Path) -> float | None:
    """Train the configured run in its folder, or show what it would do. Return the validation reward, for sweepers."""
    import time

    from lightning import seed_everything

    from var.config.choices import describe_choices
    from var.models.card import write_card
    from var.models.publish import check_target
    from var.report.write import plot
    from var.training import dry_run, show_rows, summary
    from var.training.alternatives import check_memory
    from var.training.outcome import Export, make_card, summarize
    from var.training.run import Run
    from var.utils.console import is_first_rank, say
    from var.utils.files import remove, synchronize, write_json
    from var.utils.locks import ERROR

    run = Run.compose(cfg, folder)
    if cfg.show_rows or cfg.dry:
        show = show_rows.show if cfg.show_rows else dry_run.show
        show(run)
        return None
    if is_first_rank():
        (folder / ERROR).unlink(missing_ok=True)
    run.data.read_rows()  # its errors come before a model is loaded, as those of the next two
    run.data.tokenize()
    run.check_validation_prompts()
    check_memory(run.cfg, run.settings, run.memory)
    if cfg.export.push_to_hub and is_first_rank():
        check_target(cfg.export.push_to_hub)
    say("; ".join(describe_choices()))
    if run.checkpoint is None and is_first_rank():  # otherwise when training resumes: until then, nothing changes
        run.recorded.write()

    seed_everything(cfg.seed, verbose=False)
    trainer = run.trainer(Export(run))
    try:
        module = run.module()
        started = time.perf_counter()
        run.peaks.start("annotating")
        # Its setup fills the annotation cache (AlignmentData.prepare). Its end exports the model and evaluates it.
        trainer.fit(module, run.data, ckpt_path=run.checkpoint, weights_only=True)
        result = summarize(run, trainer, time.perf_counter() - started)
        if trainer.is_global_zero:
            write_card(folder / "model", make_card(run, trainer, module, result["validation"]))
            plot([folder], folder / "plots" / "curves.png")
            synchronize(folder)
            write_json(folder / "summary.json", result)  # last: it marks the run as finished
            summary.show(result)
            if not cfg.trainer.keep_checkpoint:
                remove(folder / "checkpoints")
    finally:
        run.close(trainer)  # also after a failure: a sweep's next job would log to this one's W&B run
    push(cfg, folder)
    return None if result["reward"] is None else float(result["reward"])


def push(cfg: DictConfig, folder: Path) -> None:
    """Push the model of a finished run to the hub, if the configuration says so."""
    from var.models.publish import push_model
    from var.utils.console import is_first_rank, say

    if cfg.export.push_to_hub and is_first_rank():
        say(f"Pushed: {push_model(folder / 'model', cfg.export.push_to_hub, cfg.export.private)}")


def command() -> None:
    """Run the command line."""
    run_command(main)


if __name__ == "__main__":
    command()
