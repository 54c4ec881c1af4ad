"""LoRA: a run that trains low-rank adapters on a frozen model, which may be quantised; the reference is the model with
the adapter off."""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from var.utils.errors import UserError, brief

if TYPE_CHECKING:
    from var.models.pretrained import Pretrained

HEAD = "score"  # of a sequence classifier: it trains whole


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters (Hu et al., arXiv 2106.09685), by peft. conf/adapter has the meaning of each field.

    Their parameters are float32 whatever the model's are; B starts at zero, so the policy starts as the model.
    """

    r: int
    alpha: float
    targets: str | list[str]
    rslora: bool
    merge: bool

    def __post_init__(self) -> None:
        if importlib.util.find_spec("peft") is None:
            raise UserError("adapter= needs an extra: pip install -e '.[adapters]'")
        if self.r < 1 or not self.alpha > 0:
            raise UserError("adapter.r is at least 1 and adapter.alpha above 0")

    def attach(self, model: Any, pretrained: "Pretrained") -> Any:
        """The transformers model that `pretrained` loaded, frozen, with the adapter in its layers and on."""
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
                "adapter.targets names embeddings or head, which the engine reads as they are; leave them out"
            )
        local = Path(pretrained.path).is_dir()
        config.base_model_name_or_path = str(Path(pretrained.path).resolve()) if local else pretrained.path
        config.revision = pretrained.revision
        if scorer:
            model.score.requires_grad_(True)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        return model


def adapted(model: Any) -> bool:
    """Whether the model carries an adapter."""
    return isinstance(getattr(model, "peft_config", None), dict)


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Within, `model` computes as it was before its adapter; one without is left as it is."""
    if not adapted(model):
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

    def switch(off: bool) -> None:
        for layer in layers:  # peft's enable_adapters also walks what trains
            layer._disable_adapters = off
        assert all(layer.disable_adapters is off for layer in layers)

    switch(off=True)
    try:
        yield
    finally:
        switch(off=False)


def save(model: Any, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write the model's adapter as peft does; of a sharded model, from its gathered `state`."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    weights = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    folder.mkdir(parents=True)
    named = {f"base_model.model.{name}": weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(str(folder))


def merged(model: Any, folder: Path, keep: bool = False) -> Any:
    """The model with the LoRA adapter of `folder` added to its weights; a UserError where the two do not fit.

    keep: the adapter stays beside the weights, which nothing changes; the model is for reading.
    """
    from peft import PeftConfig, PeftModel

    if not (folder / "adapter_model.safetensors").exists():  # peft would read a pickled one
        raise UserError(f"{folder} holds no .safetensors; pickled weights are not read")
    before = (model.get_input_embeddings(), model.get_output_embeddings())
    config = PeftConfig.from_pretrained(str(folder))
    unfit = f"the adapter {folder} does not fit its base {config.base_model_name_or_path}"
    try:
        adapted = PeftModel(model, config)  # no head of peft's own, whatever the adapter's task is
        told = adapted.load_adapter(str(folder), "default", torch_device="cpu")
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{unfit}: {brief(error)}") from error
    if strange := [*told.missing_keys, *told.unexpected_keys]:  # peft warns at most, and these would do nothing
        raise UserError(f"{unfit}: {len(strange)} of its weights are on one side only, as {strange[0]}")
    after = (model.get_input_embeddings(), model.get_output_embeddings())
    if keep:
        return adapted.base_model.model.requires_grad_(False)
    both = before[1] is not None and model.config.tie_word_embeddings
    if both and any(a is not b for a, b in zip(before, after, strict=True)):
        raise UserError(
            f"the adapter {folder} adapts one of embeddings and head, which its base holds as one tensor: merged, it "
            "would change both"
        )
    return adapted.merge_and_unload().requires_grad_(True)  # peft froze the base
