"""debug=dry: what a run needs, what the cache holds, memory per device, and one rendered row. Nothing is computed."""

import torch
from hydra.utils import get_class

from var.annotate.annotator import MissingAnnotations
from var.data.rows import read
from var.models.pretrained import blocks
from var.requirements import ReferenceLogps, Rollout, find
from var.training.checkpoints import free_bytes
from var.training.optim import MasterAdamW, state_size
from var.training.run import Run
from var.utils.console import say

# Bytes per weight of a quantized linear layer: 4 bit with an 8-bit scale per 64 weights and its own scale, or 8 bit.
QUANTIZED = {"nf4": 0.5 + 0.127 / 8, "fp4": 0.5 + 0.127 / 8, "int8": 1.0}
GIB = 2**30


def show(run: Run) -> None:
    """Print all sections. If annotations are missing, print how many, and the command that computes them."""
    say("The loss requires:")
    for requirement in run.data.requirements:
        name = type(requirement).__name__
        unit = "" if requirement.unit == "-" else f" in {requirement.unit}"
        say(f"  {name} {requirement.shape}{unit}: {requirement.text} ({requirement.provider})")
        if inputs := getattr(getattr(requirement, "estimator", None), "inputs", ()):
            say(f"    computed from {', '.join(inputs)}")
    if not run.data.requirements:
        say("  nothing besides the responses")
    show_memory(run)
    say("Data:")
    try:
        run.data.prepare()
    except MissingAnnotations as missing:
        say(f"  {missing}")
        say(f"  The rest depends on them. Compute them with: {run.annotator.command}")
    say("In the annotation cache:")
    for title, (missing_items, items) in run.annotator.missing.items():
        say(f"  {title.lower()}: {items - missing_items} of {items}")
    if not run.annotator.missing:
        say("  nothing is read from it")
    show_row(run)


def show_memory(run: Run) -> None:
    """Print parameters, disk, and bytes per device: weights, gradients, optimizer state, activations, logits."""
    settings, cfg = run.settings, run.cfg
    model = run.pretrained.build_meta()
    parameters = sum(p.numel() for p in model.parameters())
    width = model.dtype.itemsize
    weights, quantized = parameters * width, run.pretrained.quantization
    if quantized:
        layers_of = (module for block in blocks(model) for module in block.modules())
        linear = sum(module.weight.numel() for module in layers_of if isinstance(module, torch.nn.Linear))
        weights += linear * (QUANTIZED[quantized] - width)
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
    copies, per_parameter = kind is MasterAdamW, state_size(kind, width)
    kept = "two moments and float32 copies" if copies else "two moments" if per_parameter else "unknown"
    states, states_size = f"optimizer ({kept})", trained * per_parameter / shards
    on_host = copies and optimizer.device == "cpu"
    stored = config.hidden_size * layers if run.pretrained.gradient_checkpointing else layer * layers
    checkpointing = f"gradient checkpointing {'on' if run.pretrained.gradient_checkpointing else 'off'}"
    parts = {
        "weights": weights / shards,
        "gradients": trained * width / shards,
        **({} if on_host else {states: states_size}),
        f"activations (estimate, {tokens:,} tokens, {checkpointing})": tokens * stored * half,
        "logits (one chunk)": 3 * 256 * config.vocab_size * 4,
    }
    checkpoint, export = trained * (width + per_parameter), parameters * model.dtype.itemsize
    say(
        f"Disk: a checkpoint of {checkpoint / GIB:.2f} GiB, next to the previous one while it is written, and a model "
        f"of {export / GIB:.2f} GiB; free at {cfg.runs}: {free_bytes(run.folder) / GIB:.2f} GiB"
    )
    say(f"Memory per device ({settings.world} in all, {cfg.strategy.name}, {settings.arithmetic}):")
    say(f"  parameters: {parameters:,} in {run.pretrained.quantization or cfg.model.dtype}")
    if run.adapter is not None:
        say(f"  trained: {trained:,} of an adapter")
    for name, size in parts.items():
        say(f"  {name}: {size / GIB:.2f} GiB")
    say(f"  in total: {sum(parts.values()) / GIB:.2f} GiB")
    if cfg.strategy.name == "fsdp" and cfg.data.validation_prompts:
        say(f"  while sampling for validation, in addition: {weights / GIB:.2f} GiB, the complete model")
    if on_host:
        say(f"  {states}, in host memory: {states_size / GIB:.2f} GiB")
    requirements = run.data.requirements
    runs_reference = find(requirements, Rollout) and find(requirements, ReferenceLogps)
    copy = "the same weights, with the adapter off" if run.adapter is not None else "a second copy of the weights"
    say(
        "  reference: "
        + (
            copy
            if cfg.reference == "live" or runs_reference
            else "not loaded in training; its numbers come from the annotation cache"
        )
    )


def show_row(run: Run) -> None:
    """Print one training row as text, with its response span marked."""
    say("One row, with the trained tokens between ⟦ and ⟧:")
    sequences = getattr(run.data.training_set, "sequences", None)
    tokenizer = run.annotator.chat.tokenizer
    if sequences is not None:
        ids, start, name = sequences.tokens(0)
        say(f"  row {name}: {start} prompt tokens, {len(ids) - start} response tokens")
        say(f"{tokenizer.decode(ids[:start])}⟦{tokenizer.decode(ids[start:])}⟧")
        return
    prompt = read(run.data.source, run.annotator.cache)[0].prompt
    say(f"{run.annotator.chat.render(prompt)}⟦… the response is not available yet …⟧")
