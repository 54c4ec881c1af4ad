"""Write docs/fits.md: how each model configuration fits which GPUs. `python experiments/gpu/fits.py`."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from hydra import compose, initialize_config_dir

from var.config.check import FOLDER
from var.config.schema import TrainerSettings
from var.training.memory import GIB, MemoryModel, peak

PAGE = Path(__file__).parents[2] / "docs" / "fits.md"
CARDS = (24, 40, 80, 141)  # GiB
DEVICES = (1, 4, 8)
LESS = ("model.dtype=bfloat16", "model.gradient_checkpointing=true")
# How a model can train, in order of preference: name, overrides, and whether it is sharded.
WAYS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("full", (), False),
    ("fsdp", (), True),
    ("offload", ("optim=adamw_masters", "optim.optimizer.device=cpu", *LESS), False),
    ("lora", ("adapter=lora", *LESS), False),
    ("lora nf4", ("adapter=lora", "model.quantization=nf4", *LESS), False),
)
INTRODUCTION = """# What fits

How `python train.py model=… data=offsetbias reward=offsetbias-rm-8b loss=var` fits GPUs, with the defaults of the configuration (micro-batches of 8 sequences of at most 1,024 tokens). Each cell has the first way that fits and the memory per device that it needs in its largest stage, in GiB, with a margin of 2 GiB and 5 %. `strategy=auto` chooses between the first two. This page is generated from the memory model by `python experiments/gpu/fits.py`. The memory model is compared with PyTorch's memory trackers in the tests; it has not been compared with a GPU.

| way | overrides |
| --- | --- |
| full | one replica per device |
| fsdp | `strategy=fsdp`: parameters, gradients and optimizer are sharded over the devices |
| offload | `optim=adamw_masters optim.optimizer.device=cpu`: the optimizer in host memory |
| lora | `adapter=lora` |
| lora nf4 | `adapter=lora model.quantization=nf4` |

The last three are with `model.dtype=bfloat16 model.gradient_checkpointing=true`.
"""  # noqa: E501


def list_models() -> list[str]:
    """Return the names of the model configurations with sizes."""
    names = (path.stem for path in sorted(Path(FOLDER, "model").glob("*.yaml")))
    return [name for name in names if not name.startswith("_") and name != "hub"]


def measure(name: str) -> dict[tuple[str, int], float]:
    """Return the bytes per device of a model by way and number of devices."""
    needed = {}
    for way, words, sharded in WAYS:
        if name.endswith("int4") and not way.startswith("lora nf4"):
            continue
        cfg = compose("train", [f"model={name}", "loss=var", "data=offsetbias", "reward=offsetbias-rm-8b", *words])
        cfg.trainer.device_memory = "80GiB"
        model = MemoryModel.of(cfg, TrainerSettings(**cfg.trainer))
        for devices in DEVICES:
            if devices > 1 or not sharded:
                ways = ({}, {"shard_reference": True}, {"shard_reference": True, "gather": False})
                sizes = [peak(model.stages("fsdp" if sharded else "ddp", devices, **more)) for more in ways]
                needed[way, devices] = min(sizes[: 3 if sharded else 1])
    return needed


def write_tables(names: Iterable[str]) -> str:
    """Return the page."""
    measured = {name: measure(name) for name in names}
    lines = [INTRODUCTION]
    for devices in DEVICES:
        lines += [f"\n## {devices} device{'s' if devices > 1 else ''}\n"]
        lines += ["| model | " + " | ".join(f"{card} GiB" for card in CARDS) + " |", "| --- " * (len(CARDS) + 1) + "|"]
        for name, needed in measured.items():
            cells = []
            for card in CARDS:
                fits = ((way, needed.get((way, devices), float("inf"))) for way, *_ in WAYS)
                found = next(((way, size) for way, size in fits if size <= card * GIB), None)
                cells.append(f"{found[0]} {found[1] / GIB:.1f}" if found else "–")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page, or with names as arguments print their tables."""
    with initialize_config_dir(FOLDER, version_base="1.3"):
        page = write_tables(sys.argv[1:] or list_models())
    if sys.argv[1:]:
        print(re.sub(r"(?s)^.*?(?=\n## )", "", page))
    else:
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
