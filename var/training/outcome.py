"""What a run leaves behind: the contents of summary.json, and the exported model with its card."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from torch.distributed.fsdp import FSDPModule

from var import __version__
from var.config.choices import describe_part, name_part
from var.config.saved import to_saved, to_yaml
from var.models.export import export
from var.models.lora import merge_adapter
from var.models.reward_model import RewardModel
from var.models.sharding import gather_weights
from var.training.metrics import budget
from var.training.module import AlignmentModule
from var.training.resume import describe_history
from var.training.run import Run
from var.utils.files import atomic
from var.utils.provenance import collect_environment
from var.utils.statistics import Estimate


def summarize(run: Run, trainer: lightning.Trainer, seconds: float) -> dict[str, Any]:
    """Return the contents of summary.json: the results and what they depend on.

    Args:
        run: the run.
        trainer: the trainer, after fitting.
        seconds: how long fitting took, evaluation included.
    """
    cfg, data, result = run.cfg, run.data, run.validation.result if run.validation else {}
    before, after = result.get("before"), result.get("after")
    validation: dict[str, Any] = {}
    if before and after:
        validation = {name: {"before": before[name], "after": after[name]} for name in before}
        if "kl" in result:
            validation["kl"] = result["kl"]
            validation["reward"]["gain"] = result.get("gain")
            validation["win_rate"] = result.get("win_rate")
            validation["judge"] = result.get("judge")
            validation["counts"] = count_what(run)
    outcome = validation.get("reward") or validation.get("accuracy")
    training = run.steps.seconds + run.steps.waited - data.seconds_of_rollouts
    report = data.report.to_json()
    return {
        "title": f"{cfg.model.name}, {cfg.data.name}, {name_part(cfg, 'loss')}",
        "folder": str(run.folder),
        "reward": outcome["after"]["mean"] if outcome and outcome["after"] else None,
        "validation": validation,
        "kl": validation.get("kl"),
        "length": validation.get("length"),
        "steps": trainer.global_step,
        "skipped_steps": trainer.lightning_module.skipped,
        "tokens_per_second": run.steps.tokens_per_second * trainer.world_size,
        "ess": report.get("weights", {}).get("ess"),
        "data": report,
        "computed": run.annotator.computed,
        "seconds_of_stages": run.annotator.seconds,
        "seconds": {
            "annotating": data.seconds + data.seconds_of_rollouts,
            "training": training,
            "evaluating": max(0.0, seconds - training - data.seconds - data.seconds_of_rollouts),
        },
        "seconds_of_earlier_attempts": budget(trainer).earlier,
        "peak_memory": run.peaks.over_ranks(),
        "hashes": {
            "plan": data.training_set.plan.hash,
            "weights": run.pretrained.weights,
            "sequences": data.fingerprint,
        },
        "seeds": {"run": cfg.seed, "data": cfg.data.seed, "sampling": cfg.generate.seed},
        "devices": trainer.world_size,
        "precision": run.settings.arithmetic,
        "ran": {
            "weights": run.pretrained.origin,
            "data": getattr(data.source, "origin", None),
            "reward_weights": getattr(run.annotator.reward, "origin", None),
            "eval_reward_weights": getattr(getattr(run.validation, "reward", None), "origin", None),
            **describe_parts(cfg),
        },
        "config": to_saved(cfg),
        "changes": run.recorded.history,
        **collect_environment(),
    }


def count_what(run: Run) -> str | None:
    """Return what the mean validation reward is the fraction of, or None if it is not a fraction."""
    own = getattr(run.validation, "reward", None)
    scaled = own is None and run.data.training_set.scale.kind != "raw"
    return None if scaled else getattr(own or run.annotator.reward, "counts", None)


class Export(Callback):
    """Exports the model at the end of training. It is evaluated later, so that a failure there does not lose it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._trained = False
        self._marker = run.folder / "checkpoints" / "exported"  # contains the step of the exported model

    def on_train_batch_start(self, *_: Any) -> None:
        """Note that the model changes, so that an earlier export is not the result of this run."""
        self._trained = True

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Export the model, unless this run did so before it was killed."""
        assert isinstance(module, AlignmentModule)
        step, marker = str(trainer.global_step), self._marker
        same = marker.exists() and marker.read_text(errors="replace") == step
        exported = same and (self.run.folder / "model").exists()
        if trainer.strategy.broadcast(exported and not self._trained):
            return
        with self.run.peaks.within("exporting"):
            export_model(self.run, trainer, module)
        if trainer.is_global_zero:
            marker.parent.mkdir(exist_ok=True)
            with atomic(marker) as file:
                file.write(step)
        trainer.strategy.barrier("export")


def export_model(run: Run, trainer: lightning.Trainer, module: AlignmentModule) -> None:
    """Write model/ in Hugging Face form with its model card. A sharded model is gathered on the first rank."""
    model, chat, target, dtype = module.policy.model, run.pretrained.chat, run.folder / "model", run.export_dtype
    if isinstance(module.policy, FSDPModule):
        module.policy.reshard()  # what is gathered can have been rounded
    state = gather_weights(model, dtype, trainer.is_global_zero)
    if not trainer.is_global_zero:
        return
    card = make_card(run, trainer, module, {})
    merge = run.adapter is not None and run.adapter.merge
    export(model, chat, run.folder / "adapter" if merge else target, card, state)
    if merge:
        plain = replace(run.pretrained, quantization=None, compile=False)
        scores = isinstance(module.policy, RewardModel)
        complete = plain.load_scorer(new_head=True) if scores else plain.load()
        complete = merge_adapter(complete, run.folder / "adapter")
        export(complete.to(dtype), chat, target, card)
    date = {"date": chat.template.today.isoformat()} if chat.template.reads_clock else {}
    with atomic(target / "config.yaml") as file:
        file.write(to_yaml(to_saved(OmegaConf.merge(run.cfg, {"model": date}))))


def make_card(
    run: Run, trainer: lightning.Trainer, module: AlignmentModule, validation: dict[str, Any]
) -> dict[str, Any]:
    """Return the contents of the model card. validation: the results in summary.json; empty before an evaluation."""
    pretrained, source, reward = run.pretrained, run.data.source, run.annotator.reward
    text = f"`{name_part(run.cfg, 'reward')}`"
    if terms := getattr(reward, "license", None):
        text += f", license: {terms}"
    return {
        "base": None if Path(pretrained.path).is_dir() else pretrained.path, "origin": pretrained.origin,
        "license": pretrained.license, "name": run.folder.name, "loss": name_part(run.cfg, "loss"),
        "version": __version__, "table": results_table(validation), "data": run.cfg.data.name,
        "data_license": getattr(source, "license", None), "plan": run.data.training_set.plan.hash, "reward": text,
        "steps": trainer.global_step, "seed": run.cfg.seed, "parts": describe_parts(run.cfg),
        "dtype": pretrained.dtype, "quantization": pretrained.quantization,
        "changes": "".join(f"\n- settings changed {text}" for text in describe_history(run.recorded.history)),
    }  # fmt: skip


def describe_parts(cfg: DictConfig) -> dict[str, Any]:
    """Return the classes of loss and reward with their arguments, as they ran."""
    parts = {"loss": cfg.loss, "reward": cfg.reward, "eval.reward": cfg.eval.reward, "adapter": cfg.adapter}
    return {name: describe_part(part) for name, part in parts.items() if part}


def results_table(validation: dict[str, Any]) -> str:
    """Return the rows of the model card's table, in Markdown."""
    labels = {
        "reward": "validation reward",
        "length": "response length, tokens",
        "accuracy": "accuracy on validation pairs",
    }
    rows = []
    for name, label in labels.items():
        if name in validation:
            before, after = (Estimate.from_json(validation[name][when]) for when in ("before", "after"))
            rows.append(f"| {label} | {before} | {after} |")
    return "\n".join(rows or ["| not evaluated | | |"])
