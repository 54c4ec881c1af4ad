"""What a run leaves behind: the contents of summary.json and the exported model with its card."""

from dataclasses import replace
from typing import Any

import lightning
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from torch.distributed.fsdp import FSDPModule

from var import __version__
from var.config.schema import to_dict
from var.models.export import export
from var.models.lora import merge_adapter
from var.models.reward_model import RewardModel
from var.training.module import AlignmentModule
from var.training.run import Run
from var.utils.provenance import collect_environment
from var.utils.statistics import Estimate


def summarize(run: Run, trainer: lightning.Trainer, seconds: float) -> dict[str, Any]:
    """Return the contents of summary.json: the results and what they depend on.

    Args:
        run: the run.
        trainer: the trainer, after fitting.
        seconds: how long fitting took, evaluation included.
    """
    cfg, data, result = run.cfg, run.data, run.validation.result
    before, after = result.get("before"), result.get("after")
    validation: dict[str, Any] = {}
    if before and after:
        validation = {name: {"before": before[name], "after": after[name]} for name in before}
        if "kl" in result:
            validation["kl"] = result["kl"]
            validation["reward"]["gain"] = result.get("gain")
            validation["win_rate"] = result.get("win_rate")
            validation["judge"] = result.get("judge")
    outcome = validation.get("reward") or validation.get("accuracy")
    training = run.steps.seconds + run.steps.waited - data.seconds_of_rollouts
    loss = HydraConfig.get().runtime.choices.get("loss")
    report = data.report.to_json()
    return {
        "title": f"{cfg.model.name}, {cfg.data.name}, {loss}",
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
        "hashes": {
            "plan": data.training_set.plan.hash,
            "weights": run.pretrained.weights,
            "sequences": data.fingerprint,
        },
        "seeds": {"run": cfg.seed, "data": cfg.data.seed, "sampling": cfg.generate.seed},
        "devices": trainer.world_size,
        "precision": run.settings.arithmetic,
        "config": to_dict(cfg),
        **collect_environment(),
    }


def export_model(run: Run, trainer: lightning.Trainer, module: AlignmentModule, summary: dict[str, Any]) -> None:
    """Write model/ in Hugging Face form with its model card. A sharded model is gathered on the first rank."""
    state = gather_state(run, module)
    if not trainer.is_global_zero:
        return
    card = {
        "base": run.cfg.init or run.cfg.model.path, "name": run.folder.name,
        "loss": HydraConfig.get().runtime.choices.get("loss"), "doc": type(module.loss).__module__,
        "version": __version__, "table": results_table(summary["validation"]), "data": run.cfg.data.name,
        "plan": summary["hashes"]["plan"], "reward": HydraConfig.get().runtime.choices.get("reward"),
        "steps": summary["steps"], "seed": run.cfg.seed,
    }  # fmt: skip
    model, chat, target = module.policy.model, run.pretrained.chat, run.folder / "model"
    merge = run.adapter is not None and run.adapter.merge
    export(model, chat, run.folder / "adapter" if merge else target, card, state)
    if merge:
        plain = replace(run.pretrained, quantization=None, compile=False)
        scores = isinstance(module.policy, RewardModel)
        complete = merge_adapter(plain.load_scorer() if scores else plain.load(), run.folder / "adapter")
        if scores:
            complete.score.load_state_dict(model.score.state_dict())
        export(complete, chat, target, card)
    OmegaConf.save(run.cfg, target / "config.yaml", resolve=True)


def gather_state(run: Run, module: AlignmentModule) -> dict[str, Any] | None:
    """Return the complete weights of a sharded policy, on the first rank; None if it is not sharded."""
    if not isinstance(module.policy, FSDPModule):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=run.adapter is not None)
    state = get_model_state_dict(module.policy.model, options=options)
    if module.policy.model.config.tie_word_embeddings:  # gathered separately, they are one tensor in the file
        for name in module.policy.model._tied_weights_keys or ():
            state.pop(name, None)
    return state


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
    return "\n".join(rows)
