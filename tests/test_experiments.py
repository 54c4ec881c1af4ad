"""The paper, item by item: each has its folder, its configuration, commands that compose, and claims only what ran."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from tests.helpers.cli import run
from tests.helpers.runs import ROOT, composed
from var.config.check import EVAL, FOLDER, TRAIN, check
from var.training import dry_run as dry
from var.training.run import Run

EXPERIMENTS = ROOT / "experiments"
ITEMS = [*(f"table{i}" for i in range(1, 10)), *(f"figure{i}" for i in range(1, 5)), "appendix_a1", "appendix_a2"]
SECTIONS = [
    "Conclusion",
    "Claim in the paper",
    "Configuration",
    "Commands at the paper's size",
    "Commands at the reduced size",
    "Results",
]
ABLATIONS = {"ablate_b": 3, "ablate_lambda": 5, "ablate_estimator": 9, "ablate_lr": 5}  # jobs
FRONTIER = ["+experiment=frontier", "seed=0"]
FOUR_PAIRS = ["loss=dpo", "data.micro_batch=4", "data.global_batch=4"]
ALOL = [*FRONTIER, "loss=alol", "loss.value.development_prompts=10"]
RAN = {  # the commands, in experiments/default and frontier, of the runs whose results a folder quotes as its own
    "table2": [[f"loss={loss}", "trainer.max_steps=56"] for loss in ("sft", "var")],
    "table4": [
        [*FRONTIER, "loss=var"],
        [*FRONTIER, "loss=var_prompt"],
        [*FRONTIER, "loss=grpo", "data.micro_batch=2", "data.global_batch=2"],
    ],
    "table5": [ALOL, [*FRONTIER, *FOUR_PAIRS], [*FRONTIER, "loss=var"]],
    "appendix_a1": [ALOL, [*FRONTIER, "loss=var_prompt"]],
    "appendix_a2": [[*FRONTIER, "loss=var_prompt"]],
}
TRAINING = ("train.py", "annotate.py", "launch/slurm.sh")
CARDS = {"llama3.1-8b": 8}  # of the paper, 80 GB each; 4 where nothing else is said


def commands(item: str) -> Iterator[tuple[str, list[str]]]:
    """(entry point, words) of each line of a README's blocks; what the user fills in is x."""
    text = (EXPERIMENTS / item / "README.md").read_text()
    for line in re.findall(r"^(?!```).+$", "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)), re.M):
        words = shlex.split(re.sub(r"<[^>]*>", "x", line), comments=True)
        program = next(i for i, word in enumerate(words) if word.endswith((".py", ".sh")) or word == "-m")
        yield words[program + (words[program] == "-m")], words[program + 1 + (words[program] == "-m") :]


def jobs(words: list[str]) -> list[list[str]]:
    """The overrides of a sweep's jobs, so many that each value is in one, at the first seed; without -m the one job."""
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
def run_of(*words: str) -> DictConfig:
    return composed(*words)


def trained(item: str) -> Iterator[DictConfig]:
    """The configuration of each training run that a README has a command for, those on a cluster left away."""
    for program, words in commands(item):
        if program in TRAINING and not any(word.startswith("hydra/launcher") for word in words):
            yield from (run_of(*job) for job in jobs(words))


def training(cfg: DictConfig) -> dict[str, Any]:
    """What a run depends on: not the place of the data, nor the devices."""
    content: dict[str, Any] = OmegaConf.to_container(cfg, resolve=False)  # type: ignore[assignment]
    content["data"].pop("folder", None)
    return content


@pytest.mark.parametrize("item", ITEMS)
def test_an_item_has_its_sections_and_its_commands_compose(item: str) -> None:
    text = (EXPERIMENTS / item / "README.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.M) == SECTIONS
    assert f"(../../conf/experiment/{item}.yaml)" in text
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (EXPERIMENTS / item / link).exists(), link
    found = list(commands(item))
    assert any(re.search(rf"\bexperiment=\[?{item}\b", " ".join(words)) for _, words in found)
    for program, words in found:
        if program in TRAINING:
            first, *others = jobs(words)
            check(run_of(*first), TRAIN)
            for word in (word for job in others for word in job if word.startswith(("model=", "loss="))):
                assert Path(FOLDER, f"{word.replace('=', '/')}.yaml").exists(), word
        elif program == "eval.py":
            check(composed(*words, root="eval"), EVAL)
        elif program == "sample.py":
            composed(*words, root="sample")
        elif program != "experiments.tabular":
            assert (ROOT / program).exists(), program


@pytest.mark.parametrize("item", RAN)
def test_what_a_folder_quotes_as_its_own_is_of_its_own_commands(item: str) -> None:
    """The runs were made by shorter commands: they are of the same configuration."""
    own = [training(cfg) for cfg in trained(item)]
    for words in RAN[item]:
        assert training(run_of(*words)) in own, words


SAME = ("figure1", "figure4", "table6", "table7")  # another one's configuration but for what comes after training


@pytest.mark.parametrize(
    "item", [pytest.param(item, marks=[pytest.mark.long] if item in SAME else []) for item in ITEMS]
)
def test_the_papers_size_passes_the_dry_run(item: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As far as it goes without a hub: the whole configuration, the model on the meta device, room on the cards."""
    cfg = composed(f"+experiment={item}", "dry=true", "trainer.accelerator=gpu", f"annotation_cache={tmp_path}")
    # the paper has no run of the appendix, and the project's has one device
    devices = cfg.trainer.devices = 1 if item.startswith("appendix") else CARDS.get(cfg.model.name, 4)
    dry.memory(Run.compose(cfg, tmp_path))
    told = capsys.readouterr().out
    assert f"({devices} in all" in told
    assert 0 < float(told.split("together: ")[1].split(" GiB")[0]) < 75


def test_the_list_has_every_item_and_its_state() -> None:
    table = (EXPERIMENTS / "README.md").read_text()
    for item in ITEMS:
        (row,) = re.findall(rf"^\| \[[^\]]+\]\({item}\) \|.*$", table, re.M)
        assert row.split("|")[3].strip().startswith(("ran", "composes only")), row


@pytest.mark.parametrize(("name", "count"), ABLATIONS.items())
def test_an_ablation_is_one_command(name: str, count: int) -> None:
    cfg = composed(f"+experiment={name}", return_hydra_config=True)
    words = [f"{key}={value}" for key, value in cfg.hydra.sweeper.params.items()]
    found = jobs(["-m", f"+experiment={name}", *words])
    assert len(found) == count
    check(run_of(*found[0]), TRAIN)
    if name == "ablate_estimator":
        assert training(run_of(*found[0])) == training(run_of("loss=sft", "trainer.max_steps=56"))
        losses = [word.removeprefix("loss=") for job in found for word in job if word.startswith("loss=")]
        assert {"sft", *(path.stem for path in Path(FOLDER, "loss").glob("var*.yaml"))} - set(losses) == {"var_online"}


@pytest.mark.e2e
def test_the_sweep_in_the_file_is_what_m_runs(tiny_folder: Path, tmp_path: Path) -> None:
    places = [
        f"model.path={tiny_folder}",
        f"annotation_cache={tmp_path}/store",
        f"cache={tmp_path}/cache",
        f"runs={tmp_path}/r",
    ]
    done = run("train.py", "-m", "+experiment=ablate_b", "debug=dry", *places)
    assert done.returncode == 0, done.stderr
    swept = [OmegaConf.load(path) for path in (tmp_path / "r").glob("*/.hydra/config.yaml")]
    assert sorted(cfg.data.micro_batch for cfg in swept) == [2, 4, 8]
    assert {cfg.loss.estimator["_target_"] for cfg in swept} == {"var.weights.estimators.InBatch"}


def test_the_variance_of_an_estimate_on_a_real_model_is_its_formula() -> None:
    """B − 1 of B terms vary: Var(Ẑ) = (B − 1)/B² of the others' variance; sampled, 1/K of a candidate's."""
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
    found = list(figure4.records(logps, rewards, candidates, seed=0))
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
