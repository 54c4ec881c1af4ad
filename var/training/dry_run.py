"""debug=dry: a verdict, and what a run needs: annotations, memory, disk, and one rendered row. Nothing is computed."""

import os
from typing import Any

from omegaconf import DictConfig

from var.annotate.annotator import MissingAnnotations
from var.config.choices import describe_choices
from var.data.read import read
from var.training.alternatives import MemoryPlan, check_memory, describe_stages, plan_memory
from var.training.checkpoints import free_bytes
from var.training.memory import GIB, MemoryModel
from var.training.run import Run
from var.training.work import count_operations, count_work, describe_time
from var.utils.console import console, say
from var.utils.errors import UnavailableError

MEASURED = 10_000
"""Rows up to which all prompts are measured."""


def show(run: Run) -> None:
    """Print the verdict and all sections. Raise UserError if the run does not fit into the devices' memory."""
    with console.capture() as report:  # printed below the verdict
        unavailable, missing = prepare(run)
    cfg = run.cfg if run.settings.gpu else with_known_length(run)
    plan = run.memory or plan_memory(cfg, run.settings)
    model = MemoryModel.of(cfg, run.settings)
    show_verdict(run, plan, model, unavailable)
    show_memory(run, plan, model)
    show_requirements(run)
    say("Data:")
    say(report.get().rstrip() or "  not read")
    if missing:
        say(f"  {missing}")
        say(f"  The rest depends on them. Compute them with: {run.annotator.command}")
    say("In the annotation cache:")
    for title, (missing_items, items) in run.annotator.missing.items():
        say(f"  {title.lower()}: {items - missing_items} of {items}")
    if not run.annotator.missing:
        say("  nothing is read from it")
    if not unavailable:
        show_row(run)
    check_memory(run.cfg, run.settings, plan)


def prepare(run: Run) -> tuple[list[str], MissingAnnotations | None]:
    """Read the data and the plan as far as possible. Return what is not on this machine, and missing annotations."""
    unavailable = []
    try:
        run.data.prepare()
    except MissingAnnotations as missing:
        run.data.report.show(say)
        return [], missing
    except UnavailableError as error:
        unavailable.append(str(error))
        try:
            run.data.report.rows = len(read(run.data.source, run.annotator.cache))
        except UnavailableError as second:
            unavailable.append(str(second))
    return unavailable, None


def with_known_length(run: Run) -> DictConfig:
    """Return the configuration with data.max_length lowered to the length of the longest sequence, if that is known.

    On a GPU, a run is checked with data.max_length before its data is read.
    """
    data, limit = run.data, run.cfg.data.max_length
    longest = limit
    if sequences := getattr(data.training_set, "sequences", None):
        longest = int((sequences.start + sequences.length).max())
    elif data.has_rows and len(data.training_set.rows) <= MEASURED:
        prompts = (len(run.annotator.chat.prompt(row.prompt)) for row in data.training_set.rows)
        longest = max(prompts) + run.cfg.generate.max_new_tokens
    cfg = run.cfg.copy()
    cfg.data.max_length = min(limit, longest)
    return cfg


def show_verdict(run: Run, plan: MemoryPlan, model: MemoryModel, unavailable: list[str]) -> None:
    """Print whether the run fits and can start, and what it trains on."""
    cfg, settings = run.cfg, run.settings
    stage = max(plan.stages, key=lambda name: sum(plan.stages[name].values()))
    needs = f"at most {plan.needed / GIB:.1f} GiB per device, with a margin, in its largest stage, {stage}"
    cards = f"{plan.devices} × {plan.memory / GIB:.0f} GiB" if plan.memory else f"{plan.devices} CPU process(es)"
    fits = "fits" if plan.fits else "does not fit"
    verdict = f"{fits} on {cards} with strategy={plan.strategy}" if plan.memory else f"runs on {cards}"
    say(f"Verdict: {verdict}; it needs {needs}.")
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not settings.gpu and (together := plan.needed * settings.local) > here:
        say(
            f"  Memory: that may be {together / GIB:.1f} GiB, and this machine has {here / GIB:.1f}. Lower "
            "data.max_length or data.micro_batch, or set adapter=lora."
        )
    checkpoint, export = model.disk()
    if (needed := 2 * checkpoint + export) > (free := free_bytes(run.folder)):
        say(
            f"  Disk: the run needs up to {needed / GIB:.1f} GiB; runs={cfg.runs} has {free / GIB:.1f} GiB free. "
            "Free disk space or set runs=<folder>."
        )
    for text in unavailable:
        what, downloaded, _ = text.partition(" could not be downloaded")  # the network's reasons are long
        say(f"  Not available: {what}{downloaded}".splitlines()[0])
    for line in describe_choices():
        say(f"  {line}")
    work = count_work(run)
    say(f"  {work.describe() if work else 'rows, optimizer steps and tokens are not known'}")
    if work and not work.planned:
        say("  less, if responses are skipped for their rewards or weights, which are not known yet")
    if work:
        operations = count_operations(run, work, model.counts.total, "cuda" if settings.gpu else "cpu")
        say(f"  {describe_time(operations, settings)}")
    window = cfg.data.global_batch // cfg.data.micro_batch
    if padding := -window % settings.world:
        say(
            f"  each optimizer step has {window} micro-batches on {settings.world} devices: {padding} turns are padding"
        )


def show_memory(run: Run, plan: MemoryPlan, model: MemoryModel) -> None:
    """Print memory per device and stage, and disk."""
    settings, cfg = run.settings, run.cfg
    checkpoint, export = model.disk()
    say(
        f"Disk: a checkpoint of {checkpoint / GIB:.2f} GiB, next to the previous one while it is written, and a model "
        f"of {export / GIB:.2f} GiB; free at {cfg.runs}: {free_bytes(run.folder) / GIB:.2f} GiB"
    )
    say(f"Memory per device ({settings.world} in all, strategy={plan.strategy}, {settings.arithmetic}):")
    say(f"  parameters: {model.counts.total:,} in {run.pretrained.quantization or cfg.model.dtype}")
    if run.adapter is not None:
        say(f"  trained: {model.counts.trained:,} of an adapter")
    for line in describe_stages(plan):
        say(line)
    if on_host := model.optimizer[1]:
        say(f"  optimizer in host memory: {on_host / GIB:.2f}")
    say(f"  micro-batches have at most {model.tokens:,} tokens in {model.sequences} sequences")
    if model.reward is None:
        say("  the reward model's size is not known here")


def show_requirements(run: Run) -> None:
    """Print what the loss requires."""
    say("The loss requires:")
    for requirement in run.data.requirements:
        name = type(requirement).__name__
        unit = "" if requirement.unit == "-" else f" in {requirement.unit}"
        say(f"  {name} {requirement.shape}{unit}: {requirement.text} ({requirement.provider})")
        if inputs := getattr(getattr(requirement, "estimator", None), "inputs", ()):
            say(f"    computed from {', '.join(inputs)}")
    if not run.data.requirements:
        say("  nothing besides the responses")


def show_row(run: Run) -> None:
    """Print one training row as text, with its response span marked."""
    say("One row, with the trained tokens between ⟦ and ⟧:")
    sequences: Any = getattr(run.data.training_set, "sequences", None)
    tokenizer = run.annotator.chat.tokenizer
    if sequences is not None:
        ids, start, name = sequences.tokens(0)
        say(f"  row {name}: {start} prompt tokens, {len(ids) - start} response tokens")
        say(f"{tokenizer.decode(ids[:start])}⟦{tokenizer.decode(ids[start:])}⟧")
        return
    prompt = read(run.data.source, run.annotator.cache)[0].prompt
    say(f"{tokenizer.decode(run.annotator.chat.prompt(prompt))}⟦… the response is not available yet …⟧")
