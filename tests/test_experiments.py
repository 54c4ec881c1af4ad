"""Each item of the paper has a page, whose commands are read, and a configuration, which fits its GPUs."""

import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from experiments.estimates import CARDS
from experiments.items import PAPER_ITEMS
from experiments.reproduce import parse
from tests.helpers.cli import run
from tests.helpers.runs import ROOT, composed
from var.config.check import FOLDER, TRAIN, check
from var.training.alternatives import describe_stages
from var.training.run import Run

EXPERIMENTS = ROOT / "experiments"
SECTIONS = ["Conclusion", "Claim in the paper", "Configuration", "Commands", "Results"]
ABLATIONS = {"ablate_b": 3, "ablate_lambda": 5, "ablate_estimator": 10, "ablate_lr": 6}  # jobs


def list_jobs(words: list[str]) -> list[list[str]]:
    """Return overrides of as many jobs of a sweep as needed for each value to occur, at the first seed.

    Without -m there is one job.
    """
    if "-m" not in words:
        return [words]
    parsed = OverridesParser.create().parse_overrides([word for word in words if word != "-m"])
    values = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [str(o.input_line)]
        for o in parsed
    ]
    values = [options[:1] if options[0].startswith("seed=") else options for options in values]
    return [[options[i % len(options)] for options in values] for i in range(max(map(len, values)))]


@cache
def compose_run(*words: str) -> DictConfig:
    return composed(*words)


def select_settings(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings on which a run's results depend: all except the folder of the data."""
    content: dict[str, Any] = OmegaConf.to_container(cfg, resolve=False)  # type: ignore[assignment]
    content["data"].pop("folder", None)
    return content


@pytest.mark.parametrize("item", PAPER_ITEMS)
def test_a_page_has_its_sections_and_its_commands_are_read(item: str) -> None:
    text = (EXPERIMENTS / item / "README.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.M) == SECTIONS
    assert f"(../../conf/experiment/{item}.yaml)" in text
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (EXPERIMENTS / item / link.partition("#")[0]).exists(), link
    commands = re.findall(r"^python -m experiments\.reproduce (.*)$", text, re.M)
    assert {"size=paper" in command for command in commands} == {True, False}
    for command in commands:
        names, settings, _ = parse(shlex.split(re.sub(r"<[^>]*>", "x", command), comments=True))
        assert (names, settings["size"] in PAPER_ITEMS[item].sizes) == ([item], True)


SAME = ("figure1", "figure4", "table6", "table7")  # they train like another item


@pytest.mark.parametrize(
    "item", [pytest.param(item, marks=[pytest.mark.long] if item in SAME else []) for item in PAPER_ITEMS]
)
def test_the_papers_size_passes_the_dry_run(item: str, tmp_path: Path) -> None:
    """Without a hub: the complete configuration, and every stage fits cards of 80 GiB."""
    cfg = composed(f"experiment={item}", "dry=true", "trainer.device_memory=80GiB", f"annotation_cache={tmp_path}")
    # the paper has no run for its appendix, and this project's has one device
    devices = cfg.trainer.devices = 1 if item.startswith("appendix") else CARDS.get(cfg.model.name, 4)
    plan = Run.compose(cfg, tmp_path).memory
    assert plan is not None
    assert (plan.devices, plan.fits) == (devices, True), describe_stages(plan)


def test_the_overview_has_every_item_and_its_state() -> None:
    table = (EXPERIMENTS / "README.md").read_text()
    for item in PAPER_ITEMS:
        (row,) = re.findall(rf"^\| \[[^\]]+\]\({item}\) \|.*$", table, re.M)
        assert row.split("|")[3].strip().startswith(("ran", "composes only")), row


@pytest.mark.parametrize(("name", "count"), ABLATIONS.items())
def test_an_ablation_is_a_single_command(name: str, count: int) -> None:
    cfg = composed(f"experiment={name}", return_hydra_config=True)
    words = [f"{key}={value}" for key, value in cfg.hydra.sweeper.params.items()]
    found = list_jobs(["-m", f"experiment={name}", *words])
    assert len(found) == count
    check(compose_run(*found[0]), TRAIN)
    if name == "ablate_estimator":
        assert select_settings(compose_run(*found[0])) == select_settings(
            compose_run("loss=sft", "trainer.max_steps=56")
        )
        losses = [word.removeprefix("loss=") for job in found for word in job if word.startswith("loss=")]
        assert {"sft", *(path.stem for path in Path(FOLDER, "loss").glob("var*.yaml"))} - set(losses) == {
            "var_online",
            "var_roulette",
        }


@pytest.mark.e2e
def test_m_runs_the_sweep_of_the_file(tiny_folder: Path, tmp_path: Path) -> None:
    places = [
        f"model.path={tiny_folder}",
        f"annotation_cache={tmp_path}/annotations",
        f"cache={tmp_path}/cache",
        f"runs={tmp_path}/r",
    ]
    done = run("train.py", "-m", "experiment=ablate_b", "debug=dry", *places)
    assert done.returncode == 0, done.stderr
    jobs = re.findall(r"#\d+ : .*data\.micro_batch=(\d+)", done.stdout)  # Hydra prints the overrides of each job
    assert sorted(map(int, jobs)) == [2, 4, 8]


def test_figure4_variances_equal_their_formulas() -> None:
    """In-batch, B − 1 of B terms vary, so Var(Ẑ) is (B − 1)/B² of their variance. Sampled, it is 1/K of one term's."""
    spec = importlib.util.spec_from_file_location("figure4", EXPERIMENTS / "figure4" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    figure4 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figure4)
    draw = np.random.default_rng(1)
    logps, rewards, candidates = draw.normal(size=(6, 6)) - 2, draw.normal(size=(6, 6)), draw.normal(size=(6, 9))
    z = np.exp(candidates).mean(1)
    others = {
        "in-batch, token means": np.exp(logps + rewards),
        "in-batch, without π_ref": np.exp(rewards),
    }
    found = list(figure4.measure(logps, rewards, candidates, seed=0))
    assert len(found) == 3 * len(figure4.SIZES)
    for record in found:
        size = record["size"]
        if record["estimator"] == "sampled":
            expected, tolerance = np.exp(candidates).var(1, ddof=1) / size, 1e-12
        else:
            terms = others[record["estimator"]]
            spread = np.array([np.delete(terms[i], i).var() for i in range(6)])
            expected, tolerance = spread * (size - 1) / size**2, 0.1
        assert record["variance"] == pytest.approx(float((expected / z**2).mean()), rel=tolerance), record
