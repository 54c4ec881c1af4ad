"""LoRA: train low-rank adapters on a frozen, possibly quantized model, which is the reference with the adapter off."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from var.utils.errors import UserError, brief
from var.utils.extras import name_install

HEAD = "score"  # head of a sequence classifier; all of its weights train


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters (Hu et al., arXiv 2106.09685), by peft.

    The adapter's parameters are float32 whatever the model's dtype is. B is initialized to zero, so the initial
    policy equals the model.

    Attributes:
        r: Rank of the adapter.
        alpha: The adapter's output is multiplied by alpha/r.
        targets: `all-linear` (every linear layer except the head), or names of layers.
        rslora: Multiply by alpha/√r instead (arXiv 2312.03732).
        merge: Export the model with the adapter merged into its weights, instead of the adapter alone.
    """

    r: int
    alpha: float
    targets: str | list[str]
    rslora: bool
    merge: bool

    def __post_init__(self) -> None:
        if importlib.util.find_spec("peft") is None:
            raise UserError(f"adapter=lora needs an extra: {name_install('adapters')}")
        if self.r < 1 or not self.alpha > 0:
            raise UserError(f"adapter: r must be at least 1 and alpha positive, got r={self.r}, alpha={self.alpha}.")

    def attach(self, model: Any, path: str, revision: str | None = None) -> Any:
        """Freeze a transformers model, loaded from `path` at `revision`, and insert a trainable adapter into it."""
        import torch
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        scorer = hasattr(model, HEAD)
        config = LoraConfig(
            r=self.r, lora_alpha=self.alpha,  # type: ignore[arg-type]
            use_rslora=self.rslora, lora_dropout=0.0,
            target_modules=self.targets if isinstance(self.targets, str) else list(self.targets),
            exclude_modules=[HEAD] if scorer else None, task_type="SEQ_CLS" if scorer else "CAUSAL_LM",
        )  # fmt: skip
        model.requires_grad_(False)
        try:
            inject_adapter_in_model(config, model)
        except ValueError as error:
            raise UserError(f"adapter.targets={self.targets}: {brief(error)}") from error
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        if any(isinstance(end, BaseTunerLayer) for end in ends):
            raise UserError(
                f"adapter.targets={self.targets} includes the embeddings or the head, which cannot be adapted. "
                "Leave them out."
            )
        config.base_model_name_or_path = str(Path(path).resolve()) if Path(path).is_dir() else path
        config.revision = revision
        if scorer:
            model.score.requires_grad_(True)
            config.modules_to_save = [HEAD]  # `save_adapter` writes it; set earlier, peft would wrap the module
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        return model


def has_adapter(model: Any) -> bool:
    """Return whether the model carries an adapter."""
    return isinstance(getattr(model, "peft_config", None), dict)


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Disable the adapter of `model`, if it has one, within the context."""
    layers = []
    if has_adapter(model):
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

    def disable(off: bool) -> None:
        for layer in layers:  # peft's own enable_adapters also changes which parameters train
            layer._disable_adapters = off
        assert all(layer.disable_adapters is off for layer in layers)

    disable(off=True)
    try:
        yield
    finally:
        disable(off=False)


def merge_adapter(model: Any, folder: Path, keep: bool = False) -> Any:
    """Return the model with the LoRA adapter in `folder` added to its weights.

    If `keep` is true, the weights stay unchanged and the adapter stays separate; the model is then for inference.
    Raises a UserError if the adapter does not fit the model.
    """
    from peft import PeftConfig, PeftModel
    from peft.utils import ModulesToSaveWrapper

    from var.models.structure import check_saved_parts

    if not (folder / "adapter_model.safetensors").exists():  # peft would read a pickled file
        raise UserError(f"{folder} contains no .safetensors file, and pickled weights are not read.")
    before = (model.get_input_embeddings(), model.get_output_embeddings())
    config = PeftConfig.from_pretrained(str(folder))
    misfit = f"the adapter {folder} does not fit its base {config.base_model_name_or_path}"
    check_saved_parts(folder, model)
    try:
        adapted = PeftModel(model, config)  # without the head that peft adds for the adapter's task
        report = adapted.load_adapter(str(folder), "default", torch_device="cpu")
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{misfit}: {brief(error)}") from error
    if unmatched := [*report.missing_keys, *report.unexpected_keys]:  # peft at most warns that they have no effect
        raise UserError(f"{misfit}: {len(unmatched)} weights exist on one side only, for example {unmatched[0]}.")
    after = (model.get_input_embeddings(), model.get_output_embeddings())
    if keep:
        complete: Any = adapted.base_model.model
        for name, module in list(complete.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):  # use the trained part itself
                complete.set_submodule(name, module.modules_to_save["default"])
        return complete.requires_grad_(False)
    tied = before[1] is not None and model.config.tie_word_embeddings
    if tied and any(a is not b for a, b in zip(before, after, strict=True)):
        raise UserError(
            f"the adapter {folder} adapts the embeddings or the head, which are tied in its base. Merging it would "
            "change both."
        )
    return adapted.merge_and_unload().requires_grad_(True)  # peft froze the base
