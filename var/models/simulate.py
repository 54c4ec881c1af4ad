"""Measure the memory of a model's forward and backward pass on fake tensors, which have shapes and no data."""

import copy
import logging
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from var.models.frozen import cast_linear_weights
from var.models.logprobs import HEAD_CHUNK
from var.models.packing import Packed, pack
from var.models.policy import Policy

# It prints an operation that has no fake form before it raises the error that `measure_activations` handles.
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)


class Peaks(NamedTuple):
    """Peak bytes in three parts of a step, besides parameters, their gradients and the optimizer's state."""

    forward: int
    """The forward pass."""
    head: int
    """The backward pass of the head, when all activations of the layers are stored."""
    layers: int
    """The backward pass of the layers."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make while the mode is active, now and at their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._add(value)
        return out

    def ignore(self, tensor: Tensor) -> None:
        """Do not count a tensor that exists already, or views of it."""
        key = tensor.untyped_storage()._cdata
        if (counted := self._seen.get(key)) is not None:
            self.live -= counted.detach()[2][1]
        self._seen[key] = None

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen[key] = weakref.finalize(storage, self._remove, key, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def _remove(self, key: int, size: int) -> None:
        self.live -= size
        del self._seen[key]


def measure_activations(
    config: Any,
    sequences: int,
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    half_weights: bool = False,
    checkpointing: bool = False,
    train: bool = True,
    prepare: Callable[[Any], Any] = lambda model: model,
) -> Peaks:
    """Return the peak bytes of a micro-batch on a device, or an estimate if the model cannot be simulated.

    Two models of one and two layers are simulated, and the peaks are extrapolated to `config`'s layers: all layers are
    alike. They include the logits, the copies of weights that autocast makes, and temporary gradients. Attention is
    that of `packed`; a kernel for all sequences takes about as much.

    Args:
        config: transformers' config of the model.
        sequences: sequences of the micro-batch.
        length: tokens of each. All but the first are response tokens.
        dtype: of the parameters.
        autocast: whether the run computes under bfloat16 autocast.
        half_weights: whether the weights arrive in bfloat16, as FSDP gathers them then.
        checkpointing: whether activations are recomputed in the backward pass.
        train: whether there is a backward pass. Without one, the model is frozen, as `FrozenModel` loads it: under
            autocast its linear layers are in bfloat16, and its head is not.
        prepare: changes the model, for example by attaching an adapter.
    """
    scored = min(length - 1, -(-2 * HEAD_CHUNK // sequences))  # the head's loop over chunks is the slow part
    batch = pack([[0] * length] * sequences, [length - scored] * sequences)
    try:
        one, two = (
            _simulate(config, layers, batch, dtype, autocast, half_weights, checkpointing, train, prepare)
            for layers in (1, 2)
        )
    except RuntimeError:  # operations without a fake form, as in some mixtures of experts
        return estimate_activations(config, sequences * length, 2 if autocast else dtype.itemsize, checkpointing)
    # hidden states of the response tokens that were left out, and their gradient
    omitted = (2 if train else 1) * (length - 1 - scored) * sequences * config.hidden_size * 4
    more = config.num_hidden_layers - 1
    return Peaks(*(first + more * (second - first) + omitted for first, second in zip(one, two, strict=True)))


def estimate_activations(config: Any, tokens: int, width: int, checkpointing: bool) -> Peaks:
    """Return peaks by a rule of thumb, for a model that cannot be simulated.

    A layer stores about 14 hidden vectors and 3 inner ones per token and expert, of `width` bytes per number. The head
    has three chunks of logits, and a float32 gradient.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    experts = getattr(config, "num_experts_per_tok", None) or 1
    layer = tokens * width * (14 * hidden + 3 * inner * experts)
    stored = tokens * 4 * hidden * layers if checkpointing else layer * layers
    head = 4 * config.vocab_size * (3 * HEAD_CHUNK + hidden)
    return Peaks(stored + layer, stored + head, stored + layer)


def make_fake(model: torch.nn.Module) -> None:
    """Replace the parameters and buffers on the meta device by fake ones on the CPU; tied ones stay tied."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                new = torch.nn.Parameter(torch.empty(old.shape, dtype=old.dtype), requires_grad=old.requires_grad)
                module._parameters[name] = made.setdefault(id(old), new)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _simulate(
    config: Any, layers: int, batch: Packed, dtype: torch.dtype, autocast: bool, half_weights: bool,
    checkpointing: bool, train: bool, prepare: Callable[[Any], Any],
) -> Peaks:  # fmt: skip
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = kinds[:layers]
    fake, live = FakeTensorMode(), LiveBytes()
    with torch.device("meta"):
        weights = torch.bfloat16 if half_weights else dtype
        model = prepare(AutoModelForCausalLM.from_config(config, dtype=weights, attn_implementation="packed"))
    if autocast and not train:
        cast_linear_weights(model, torch.bfloat16)
    with fake:
        make_fake(model)
    if half_weights:
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.float())
    if checkpointing:
        model.gradient_checkpointing_enable()
    policy = Policy(model.train())
    if not train:
        policy.requires_grad_(False)
    for tensor in (*model.parameters(), *model.buffers()):
        live.ignore(tensor)
    batch = batch._with(fake.from_tensor)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    marks = list[int]()

    def mark(*_: Any) -> None:
        """End a part."""
        marks.append(live.peak)
        live.peak = live.live

    def mark_gradient(module: Any, inputs: Any, output: Any) -> None:
        if train:
            output.last_hidden_state.register_hook(mark)

    model.base_model.register_forward_hook(mark_gradient)
    with fake, live:
        for _ in range(2 if train else 1):  # in the second pass gradients are added to those of the first
            marks.clear()
            live.peak = live.live
            with nullcontext() if train else torch.no_grad(), context:
                logps = policy(batch)
            mark()
            if train:
                logps.sum().backward()
                mark()
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        live.ignore(parameter.grad)
            del logps
    return Peaks(*marks) if train else Peaks(marks[0], 0, 0)
