"""The memory that a run needs per device and stage, and the strategy that fits, before anything is loaded.

Persistent parts are arithmetic on the model's sizes. Activations and temporary tensors are measured on fake tensors
(`var/models/simulate.py`). tests/training/test_memory.py compares the sums with torch's own memory trackers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from var.annotate.annotator import TOKENS
from var.annotate.base import make_providers, unit_of
from var.config.schema import TrainerSettings, pick_fields
from var.models.lora import LoRA
from var.models.pretrained import Pretrained
from var.models.simulate import Peaks, measure_activations
from var.models.structure import blocks
from var.requirements import ReferenceLogps, Rollout, find
from var.training.optim import MasterAdamW, state_size

# Bytes per weight of a quantized linear layer: 4 bit with an 8-bit scale per 64 weights and its own scale, or 8 bit.
QUANTIZED = {"nf4": 0.5 + 0.127 / 8, "fp4": 0.5 + 0.127 / 8, "int8": 1.0}
GIB = 2**30
MARGIN = 2 * GIB  # CUDA's context, communication buffers
FRAGMENTED = 0.05  # of the needed memory: what PyTorch's allocator cannot use

HEAD = "output head in bfloat16"

Parts = dict[str, float]
"""Bytes per device by what they hold."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of parameters of a model."""

    total: int
    """All."""
    trained: int
    """Those that train: all, or an adapter's."""
    block: int
    """The largest layer's."""
    blocks: int
    """All layers'."""
    linear: int
    """Weights of linear layers, without embeddings and head: autocast copies them, and quantization applies to them."""

    @property
    def root(self) -> int:
        """Those outside of the layers: embeddings, head and last norm."""
        return self.total - self.blocks

    @classmethod
    def of(cls, model: Any) -> "Counts":
        """Count a transformers model."""

        def count(module: torch.nn.Module) -> int:
            return sum(p.numel() for p in module.parameters())

        sizes = [count(block) for block in blocks(model)]
        linear = sum(
            layer.weight.numel()
            for block in blocks(model)
            for layer in block.modules()
            if isinstance(layer, torch.nn.Linear)
        )
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return cls(total=count(model), trained=trained, block=max(sizes), blocks=sum(sizes), linear=linear)


@dataclass(frozen=True)
class MemoryModel:
    """The memory of a run's stages on a number of devices."""

    cfg: DictConfig
    """The composed configuration."""
    pretrained: Pretrained
    """The model."""
    adapter: LoRA | None
    """The adapter that trains, or None."""
    arithmetic: str
    """The trainer's precision, resolved."""
    _measured: dict[tuple[bool, bool], Peaks] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, cfg: DictConfig, settings: TrainerSettings) -> "MemoryModel":
        """Return the memory model of a configuration."""
        pretrained = Pretrained(**pick_fields(Pretrained, cfg.model), cache=cfg.cache)
        return cls(cfg, pretrained, instantiate(cfg.adapter) if cfg.adapter else None, settings.arithmetic)

    @cached_property
    def model(self) -> Any:
        """The model on the meta device, with its adapter."""
        model = self.pretrained.build_meta()
        return self._with_adapter(model)

    def _with_adapter(self, model: Any) -> Any:
        if self.adapter is None:
            return model
        return self.adapter.attach(model, self.pretrained.path, self.pretrained.revision)

    @cached_property
    def counts(self) -> Counts:
        """The model's numbers of parameters."""
        return Counts.of(self.model)

    @property
    def half(self) -> bool:
        """Whether the run computes in bfloat16 on parameters of another dtype."""
        return self.arithmetic == "bf16-mixed"

    @property
    def width(self) -> int:
        """Bytes of a parameter."""
        return 8 if self.arithmetic == "64-true" else int(self.model.dtype.itemsize)

    @property
    def computed_width(self) -> int:
        """Bytes of a parameter in the computation."""
        return 2 if self.half else self.width

    @cached_property
    def weights(self) -> float:
        """Bytes of all parameters."""
        counts, adapter = self.counts, self.counts.trained if self.adapter is not None else 0
        size = float((counts.total - adapter) * self.width + adapter * max(4, self.width))
        if kind := self.pretrained.quantization:
            size += (counts.linear - adapter) * (QUANTIZED[kind] - self.width)
        return size

    @cached_property
    def frozen(self) -> float:
        """Bytes of a frozen copy on one device: linear layers in the dtype of the computation, the rest unchanged."""
        if self.pretrained.quantization:
            return self.weights
        counts, adapter = self.counts, self.counts.trained if self.adapter is not None else 0
        linear = counts.linear - adapter
        return linear * self.computed_width + (counts.total - adapter - linear) * self.width

    @property
    def head(self) -> float:
        """Bytes of the output head's copy in bfloat16, which a pass of a frozen model on a GPU makes."""
        return self.model.get_output_embeddings().weight.numel() * 2.0 if self.half and self.width > 2 else 0.0

    @property
    def gradients(self) -> float:
        """Bytes of the gradients."""
        return self.counts.trained * (max(4, self.width) if self.adapter is not None else self.width)

    @cached_property
    def optimizer(self) -> tuple[float, float]:
        """Bytes of the optimizer's state on the devices and on the host."""
        optimizer = self.cfg.optim.optimizer
        kind = get_class(optimizer._target_)
        width = max(4, self.width) if self.adapter is not None else self.width
        size = self.counts.trained * state_size(kind, width)
        on_host = kind is MasterAdamW and optimizer.device == "cpu"
        return (0.0, size) if on_host else (size, 0.0)

    @cached_property
    def sequences(self) -> int:
        """Sequences of a micro-batch, at most."""
        cfg, requirements = self.cfg, instantiate(self.cfg.loss).requires
        unit = unit_of(make_providers(requirements))
        each = 2 if unit == "pair" else cfg.generate.responses if unit == "group" or find(requirements, Rollout) else 1
        return int(cfg.data.micro_batch * each)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch, at most."""
        return int(self.sequences * self.cfg.data.max_length)

    def activations(self, sharded: bool = False, train: bool = True) -> Peaks:
        """Return the peak bytes of activations and temporary tensors of a micro-batch, or of a scoring pass."""
        if (sharded, train) not in self._measured:
            self._measured[sharded, train] = self._measure(sharded, train)
        return self._measured[sharded, train]

    def _measure(self, sharded: bool, train: bool) -> Peaks:
        length = self.cfg.data.max_length
        return measure_activations(
            self.model.config,
            self.sequences if train else max(1, TOKENS // length),
            length,
            dtype=torch.bfloat16 if self.pretrained.quantization else getattr(torch, self.pretrained.dtype),
            autocast=self.half,
            half_weights=self.half and sharded,
            checkpointing=self.pretrained.gradient_checkpointing,
            train=train,
            prepare=self._with_adapter if train else lambda model: model,
        )

    @property
    def cache_per_token(self) -> int:
        """Bytes of the key-value cache per token and sequence."""
        config = self.model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * size * self.computed_width)

    @cached_property
    def reward(self) -> float | None:
        """Bytes of the reward model with its activations; 0 if none is loaded, None if its size is not known."""
        reward = instantiate(self.cfg.reward)
        measure = getattr(reward, "measure_memory", None)
        return 0.0 if measure is None else measure()

    def stages(
        self, strategy: str, devices: int, *, shard_reference: bool = False, gather: bool = True
    ) -> dict[str, Parts]:
        """Return the bytes per device of each stage.

        Args:
            strategy: `fsdp` shards the model over the devices, every other strategy keeps a replica on each.
            devices: the number of devices.
            shard_reference: whether fsdp shards the reference too.
            gather: whether fsdp gathers the policy to sample from it, or each of its layers for each token.
        """
        sharded = strategy == "fsdp" and devices > 1
        shards = devices if sharded else 1
        counts, wide = self.counts, self.computed_width
        gathered = counts.root * wide + 2 * counts.block * wide if sharded else 0.0
        alone = self._reference(shards if shard_reference else 1)
        requirements = instantiate(self.cfg.loss).requires
        held = {"weights": self.weights / shards, "optimizer": self.optimizer[0] / shards}
        # In steps or rollouts; it stays on the device during evaluation and export.
        runs = self.cfg.reference == "live" or bool(find(requirements, Rollout) and find(requirements, ReferenceLogps))
        if runs:
            held["reference"] = alone
        scoring = {"activations": float(max(self.activations(train=False))), HEAD: self.head}
        stages: dict[str, Parts] = {}
        if self.reward:
            stages["annotation, reward model"] = {"reward model": self.reward}
        stages["annotation, reference"] = {"reference": alone or self.frozen, **scoring}
        step = self._step(sharded)
        if runs:  # before the policy; its passes over B×B pairings have the tokens of a scoring pass or a micro-batch
            step = max(step, scoring, key=lambda parts: sum(parts.values()))
        stages["training"] = {**held, "gradients": self.gradients / shards, **step}
        sample, quantized = self.cfg.eval.sampling, self.pretrained.quantization
        longest = self.cfg.data.max_length + sample["max_new_tokens"]
        cache = float(sample["responses"] * longest * self.cache_per_token)
        copies = counts.linear * 2.0 if self.half and self.width > 2 and not sharded and not quantized else 0.0
        if self.cfg.eval.enabled and self.cfg.data.validation_prompts:
            policy = (counts.total * wide if gather else gathered) if sharded else copies
            sampling = {**held, "weights to sample from": policy, "key-value cache of one prompt": cache}
            stages["evaluation, sampling"] = sampling
            if self.reward:
                stages["evaluation, reward model"] = {**held, "reward model": self.reward}
            # first the policy scores, and then the reference, which takes more, or the policy without its adapter
            loaded = 0.0 if runs else alone
            stages["evaluation, KL"] = {**held, "weights to score with": loaded or gathered or copies, **scoring}
        largest = max(p.numel() for p in self.model.parameters()) * self.width
        stages["export"] = {**held, "largest parameter": float(largest) if sharded else 0.0}
        return stages

    def _step(self, sharded: bool) -> Parts:
        """Return the bytes of a training step at its peak, besides weights, gradients and optimizer."""
        peaks, counts = self.activations(sharded), self.counts
        if not sharded:
            return {"activations": float(max(peaks))}
        width, reduced = self.computed_width, 4 if self.half else self.width
        embeddings = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        head = 0 if self.adapter is not None else embeddings[1].weight.numel()
        root, block = counts.root * width, counts.block * width
        trained = 0 if self.adapter is not None else 1
        moments: list[Parts] = [
            {"gathered weights": root + 2 * block, "activations": peaks.forward},
            {"gathered weights": root + block, "activations": peaks.head},
            {
                "gathered weights": root + 2 * block, "activations": peaks.layers,
                "gradients before reduction": head * width + trained * counts.block * reduced,
            },
            {"gradients before reduction": trained * counts.root * (width + reduced)},  # at the end, of the embeddings
        ]  # fmt: skip
        return max(moments, key=lambda parts: sum(parts.values()))

    def _reference(self, shards: int) -> float:
        if self.adapter is not None:
            return 0.0
        if shards == 1:
            return self.frozen
        width = self.computed_width  # what is outside of the layers stays gathered
        return self.counts.total * width / shards + (self.counts.root + 2 * self.counts.block) * width

    def disk(self) -> tuple[float, float]:
        """Return the bytes of a checkpoint and of the exported model."""
        trained = self.gradients + sum(self.optimizer)
        return trained, self.counts.total * self.model.dtype.itemsize


def peak(stages: Mapping[str, Parts]) -> float:
    """Return the bytes per device that the largest stage needs, with the margin."""
    return max(sum(parts.values()) for parts in stages.values()) * (1 + FRAGMENTED) + MARGIN


def device_memory(settings: TrainerSettings) -> float | None:
    """Return the bytes of the smallest device, given or found; None on a CPU, whose memory is not limited here."""
    if settings.device_bytes is not None:
        return settings.device_bytes
    if not settings.gpu:
        return None
    found = range(torch.cuda.device_count())
    return float(min(torch.cuda.get_device_properties(i).total_memory for i in found)) if found else None


def list_strategies(model: MemoryModel, devices: int) -> Iterator[str]:
    """Yield the strategies that strategy=auto considers, in order of preference."""
    yield "ddp" if devices > 1 else "single"
    masters = get_class(model.cfg.optim.optimizer._target_) is MasterAdamW
    if devices > 1 and not model.pretrained.quantization and not masters:
        yield "fsdp"
