"""Each example command passes the checks of a dry run on the number of devices that it names."""

import functools
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from experiments.estimates import CARDS
from experiments.items import PAPER_ITEMS
from tests.helpers.runs import ROOT, composed
from tests.test_docs import commands
from tests.test_experiments import list_jobs
from var.training.checks import check_strategy, count_accumulation
from var.training.run import Run
from var.utils.errors import UnavailableError

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("experiments/**/README.md"))]
PROGRAMS = ("train.py", "annotate.py", "launch/slurm.sh", "launch/torchrun.sh")


class Devices(NamedTuple):
    """Processes that a command starts."""

    per_machine: int
    machines: int = 1


def list_commands(page: Path) -> list[tuple[str, int]]:
    """Return the training and annotation commands of a page, each with 1 device if it names none."""
    found = commands(page)
    return [(one, 1) for one in found if any(program in one for program in PROGRAMS) and "…" not in one]


def list_item_commands(name: str) -> list[tuple[str, int]]:
    """Return the training commands of an item at the paper's size, with the paper's number of GPUs."""
    rows = [row for table in PAPER_ITEMS[name].sizes["paper"] for row in table.rows if "train" in row.stages]
    words = [row.stages["train"].words for row in rows]
    models = [next((word[6:] for word in one if word.startswith("model=")), "") for one in words]
    texts = [f"python train.py {shlex.join(one).replace('{seed}', '0')}" for one in words]
    return [(text, CARDS.get(model, 4)) for text, model in dict(zip(texts, models, strict=True)).items()]


COMMANDS = [(str(page.relative_to(ROOT)), *entry) for page in PAGES for entry in list_commands(page)]
COMMANDS += [(f"size=paper of {name}", *entry) for name in PAPER_ITEMS for entry in list_item_commands(name)]


def parse(command: str) -> tuple[dict[str, str], list[str], str, list[str]]:
    """Return variables, the launcher's words, the program, and the overrides. Placeholders are replaced by x."""
    words = shlex.split(re.sub(r"<[^>]*>", "x", command.rpartition("&& ")[2]))
    variables = {name: value for name, _, value in (w.partition("=") for w in words if re.match(r"[A-Z_]+=", w))}
    at = next(i for i, word in enumerate(words) if word.endswith(PROGRAMS))
    overrides = words[at + 1 :]
    if overrides and overrides[0].endswith(".py"):  # the program that a script of launch/ starts
        overrides = overrides[1:]
    if "--config-dir" in overrides:
        folder = overrides.index("--config-dir")
        overrides[folder : folder + 2] = [f"hydra.searchpath=[file://{ROOT / overrides[folder + 1]}]"]
    return variables, words[:at], words[at], [word for word in overrides if not word.startswith("init=")]


def read_options(words: list[str]) -> dict[str, int]:
    """Return the options with a number of a launcher's words, `--name=4` or `--name 4`."""
    return {name: int(number) for name, number in re.findall(r"--([\w-]+)[= ](\d+)", " ".join(words))}


def count_devices(command: str, cards: int) -> Devices:
    """Return the devices that a command names, or `cards` devices of one machine."""
    variables, launcher, program, overrides = parse(command)
    given = dict(word.split("=", 1) for word in overrides if "=" in word)
    if program == "launch/slurm.sh":
        script = re.findall(r"^#SBATCH (--\S+)", (ROOT / program).read_text(), re.M)
        options = read_options(script) | read_options(launcher)
        assert options["gpus-per-node"] == options["ntasks-per-node"], command
        return Devices(options["ntasks-per-node"], options["nodes"])
    if program == "launch/torchrun.sh":
        return Devices(int(variables.get("PER_NODE", 8)), int(variables["NODES"]))
    if launcher[:1] == ["torchrun"]:
        return Devices(read_options(launcher)["nproc-per-node"])
    devices = Devices(int(given.get("trainer.devices", cards)), int(given.get("trainer.num_nodes", 1)))
    for name in ("tasks_per_node", "gpus_per_node"):
        assert int(given.get(f"hydra.launcher.{name}", devices.per_machine)) == devices.per_machine, command
    return devices


@functools.cache
def check_on_devices(words: tuple[str, ...], devices: Devices, folder: Path) -> None:
    """Check a run as debug=dry does, without its data and model."""
    sizes = [f"trainer.devices={devices.per_machine}", f"trainer.num_nodes={devices.machines}"]
    cfg = composed(*words, "dry=true", "annotate=fill", "trainer.accelerator=gpu", *sizes)
    run = Run.compose(cfg, folder)
    assert run.settings.world == devices.per_machine * devices.machines
    check_strategy(cfg, run.settings)
    assert count_accumulation(cfg, run.settings) >= 1


def test_devices_of_commands_are_read() -> None:
    found = {command: count_devices(command, cards) for _, command, cards in COMMANDS}
    assert len(COMMANDS) > 60
    assert {devices.machines for devices in found.values()} >= {1, 2}
    assert {devices.per_machine for devices in found.values()} >= {1, 2, 4, 8, 32}


SHORT = ("docs/losses.md",)  # pages that the default suite checks


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.long] * (page not in SHORT))
        for page in sorted({page for page, _, _ in COMMANDS})
    ],
)
def test_commands_pass_the_dry_run(
    page: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On as many devices as each command names; those of an item at the paper's size, on the paper's number of GPUs."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    failed = list[str]()
    for _, command, cards in (entry for entry in COMMANDS if entry[0] == page):
        overrides, devices = parse(command)[-1], count_devices(command, cards)
        overrides = [re.sub(r"=tag\(.*\)$|=interval\(.*\)$", "=1", word) for word in overrides]
        own = ("trainer.devices=", "trainer.num_nodes=", "hydra/", "hydra.launcher", "debug=", "annotate=")
        for job in list_jobs(overrides):
            words = tuple(word for word in job if not word.startswith(own))
            try:
                check_on_devices(words, devices, tmp_path_factory.getbasetemp())
            except UnavailableError:  # a model of the hub without sizes in the configuration
                continue
            except Exception as error:
                failed.append(f"{command}\n  on {devices}: {error}")
                break
    assert not failed, "\n".join(failed)
