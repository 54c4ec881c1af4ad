"""debug=dry: what a run needs, what the store holds, memory per device, and one rendered row; nothing is computed."""

from typing import TYPE_CHECKING

import torch
from hydra.utils import get_class

from var.annotate.annotator import Unfilled
from var.data.rows import read
from var.models.pretrained import blocks
from var.requirements import Need
from var.training.checkpoints import room
from var.training.optim import MasterAdamW, state_size
from var.utils.console import say

if TYPE_CHECKING:
    from var.training.run import Run


# bytes a weight of a quantised linear layer: 4 bit with 8 bit scales of 64 weights each, and their own; 8 bit
QUANTISED = {"nf4": 0.5 + 0.127 / 8, "fp4": 0.5 + 0.127 / 8, "int8": 1.0}


def show(run: "Run") -> None:
    """Print all of it; what cannot be known before something is computed says so."""
    say("The loss needs:")
    for need in sorted(run.data.loss.needs, key=lambda n: n.name):
        say(f"  {need.key} {need.value.shape}, {need.value.unit}: {need.value.writer}")
    if not run.data.loss.needs:
        say("  nothing but the responses")
    memory(run)
    say("Data:")
    try:
        run.data.prepare()
    except Unfilled as unfilled:
        say(f"  {unfilled}")
        say(f"  What follows from it is known once it is computed. Fill it ahead: {run.annotator.command}")
    say("The store holds:")
    for title, (missing, items) in run.annotator.missing.items():
        say(f"  {title.lower()}: {items - missing} of {items}")
    if not run.annotator.missing:
        say("  nothing is asked of it")
    row(run)


def memory(run: "Run") -> None:
    """Parameters and bytes a device: weights, gradients, AdamW's moments, activations of one micro-batch."""
    settings, cfg = run.settings, run.cfg
    model = run.pretrained.build_meta()
    parameters = sum(p.numel() for p in model.parameters())
    width = model.dtype.itemsize
    weights, quantised = parameters * width, run.pretrained.quantization
    if quantised:
        layers_of = (module for block in blocks(model) for module in block.modules())
        linear = sum(module.weight.numel() for module in layers_of if isinstance(module, torch.nn.Linear))
        weights += linear * (QUANTISED[quantised] - width)
    trained = parameters
    if run.adapter is not None:
        run.adapter.attach(model, run.pretrained.path, run.pretrained.revision)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        weights += 4 * trained
        width = 4
    shards = settings.world if cfg.strategy.name == "fsdp" else 1
    tokens = cfg.data.micro_batch * cfg.data.max_length
    half = 2 if settings.arithmetic == "bf16-mixed" else model.dtype.itemsize
    config = model.config
    layer = 14 * config.hidden_size + 3 * config.intermediate_size  # kept for the backward pass, per token and layer
    layers = config.num_hidden_layers
    optimizer = cfg.optim.optimizer
    kind = get_class(optimizer._target_)
    copies, each = kind is MasterAdamW, state_size(kind, width)
    kept = "two moments and float32 copies" if copies else "two moments" if each else "unknown"
    states, states_size = f"optimiser ({kept})", trained * each / shards
    on_host = copies and optimizer.device == "cpu"
    stored = config.hidden_size * layers if run.pretrained.gradient_checkpointing else layer * layers
    parts = {
        "weights": weights / shards,
        "gradients": trained * width / shards,
        **({} if on_host else {states: states_size}),
        f"activations (estimate, {tokens:,} tokens)": tokens * stored * half,
        "logits (one chunk)": 3 * 256 * config.vocab_size * 4,
    }
    ends = (trained * (width + each), parameters * model.dtype.itemsize)
    say(
        "Disk at the run's end: a checkpoint of {:.2f} GiB, beside the one before while it is written, and a model of "
        "{:.2f}; room at {}: {:.2f} GiB".format(*(n / 2**30 for n in ends), cfg.runs, room(run.folder) / 2**30)
    )
    say(f"Memory a device ({settings.world} in all, {cfg.strategy.name}, {settings.arithmetic}):")
    say(f"  parameters: {parameters:,} in {run.pretrained.quantization or cfg.model.dtype}")
    if run.adapter is not None:
        say(f"  trained: {trained:,} of an adapter")
    for name, size in parts.items():
        say(f"  {name}: {size / 2**30:.2f} GiB")
    say(f"  together: {sum(parts.values()) / 2**30:.2f} GiB")
    if cfg.strategy.name == "fsdp" and cfg.data.validation_prompts:
        say(f"  while it samples for validation, beside it: {weights / 2**30:.2f} GiB, the whole model")
    if on_host:
        say(f"  {states}, host: {states_size / 2**30:.2f} GiB")
    beside = cfg.reference == "live" or run.data.loss.needs >= {Need.ROLLOUT, Need.REFERENCE_LOGPS}
    copy = "the same weights, the adapter off" if run.adapter is not None else "a second copy of the weights"
    say("  reference: " + (copy if beside else "none, its numbers are stored"))


def row(run: "Run") -> None:
    """One training row as text, its response span marked."""
    say("One row, the trained tokens between ⟦ and ⟧:")
    sequences = getattr(run.data, "sequences", None)
    tokenizer = run.annotator.chat.tokenizer
    if sequences is not None:
        ids, start, name = sequences.tokens(0)
        say(f"  row {name}: {start} prompt tokens, {len(ids) - start} response tokens")
        say(f"{tokenizer.decode(ids[:start])}⟦{tokenizer.decode(ids[start:])}⟧")
        return
    prompt = read(run.data.source, run.annotator.cache)[0].prompt  # held-out rows there may be none
    say(f"{run.annotator.chat.render(prompt)}⟦… the responses are sampled first …⟧")
