"""Every YAML composes and builds, its keys are read and pinned, and what the repository promises of itself holds."""

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from tests.helpers.runs import ROOT, composed
from var.config.check import EVAL, FOLDER, TRAIN, check, fits
from var.config.entry import leaves, run_command
from var.config.run_dir import run_dir
from var.evaluate.run import Evaluation
from var.training.loggers import loggers
from var.training.run import Run
from var.utils.errors import UserError

YAMLS = sorted(p.relative_to(FOLDER) for p in Path(FOLDER).rglob("*.yaml"))
GIVEN = {  # what a user must give
    "data/files": ["data.path=x.jsonl"],
    "data/prompts": ["data.path=x.txt"],
    "data/hha": ["data.folder=x"],
    "experiment/hha": ["data.folder=x"],
    "reward/endpoint": ["reward.client.base_url=http://127.0.0.1:9"],
    "benchmarks/local": ["benchmarks.folder=x"],
    "reward/ensemble": ["+reward@reward.members.a=exact_number"],
    "data/preferences": ["data.path=someone/pairs"],
    "sampler/endpoint": [f"sampler.client.{key}=http://x" for key in ("base_url", "model")],
    "model/qwen2.5-32b-int4": ["adapter=lora"],
    "reward/classifier": ["reward.path=someone/rm"],
}


def test_every_yaml_is_seen() -> None:
    assert len(YAMLS) == COUNT


COUNT = 126


@pytest.mark.parametrize("path", [p for p in YAMLS if not p.name.startswith("_") and len(p.parts) > 1], ids=str)
def test_every_yaml_composes_and_builds(path: Path, tmp_path: Path) -> None:
    group, name = str(path.parent), path.stem
    overrides = [
        f"{group}={name}" if group != "experiment" else f"+experiment={name}",
        *GIVEN.get(f"{group}/{name}", ()),
    ]
    overrides += [f"annotation_cache={tmp_path}/s", f"cache={tmp_path}/c"]
    if group in ("judge", "benchmarks"):
        evaluation = Evaluation.compose(composed(*overrides, root="eval"))
        assert evaluation.judge or evaluation.benchmarks
        return
    try:
        run = Run.compose(composed(*overrides), tmp_path)
    except ValueError:  # a path that is looked at when the source is built
        if f"{group}/{name}" not in GIVEN:
            raise
        check(composed(*overrides), TRAIN)
        return
    assert callable(instantiate(run.cfg.optim.optimizer))
    assert instantiate(run.cfg.optim.schedule).factor(0, 10) > 0


def test_the_papers_command_composes() -> None:
    """The hub configuration is complete; its model builds on the meta device (tests/test_models.py) and its memory is
    known without a hub."""
    cfg = composed("model=qwen2.5-7b", "data=offsetbias", "reward=offsetbias-rm-8b", "loss=var", "strategy=fsdp")
    check(cfg, TRAIN)
    run = Run.compose(cfg, Path("."))
    assert sum(p.numel() for p in run.pretrained.build_meta().parameters()) == 7_615_616_512
    assert cfg.data.global_batch % (8 * cfg.data.micro_batch) == 0


def test_the_keys_are_pinned() -> None:
    """A new key shows in review. To accept it: python -m pytest tests/test_config.py prints the list; edit keys.txt."""
    known = (ROOT / "tests" / "keys.txt").read_text().split()
    assert sorted(leaves(composed())) == known


@dataclass(frozen=True, kw_only=True)
class Reader:
    rate: float
    kind: Literal["a", "b"]
    steps: int | None = None


def test_wrong_types_unknown_and_absent_keys_are_told_at_once() -> None:
    cfg = OmegaConf.create({"part": {"rate": "fast", "kind": "c", "step": 3}, "other": {"rate": 1}, "open": "???"})
    with pytest.raises(ValueError, match="cannot be used") as error:
        check(cfg, {"part": Reader, "other": Reader})
    for line in (
        "part.step: nothing reads this key; did you mean steps?",
        "part.rate: 'fast' is no float",
        "part.kind: 'c' is no a or b",
        "other.kind: this key is not there",
        "open: must be given: open=…",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize(
    ("root", "schemas", "overrides", "lines"),
    [
        (
            "train", TRAIN,
            ["trainer.max_steps=a", "+seeds=1", "optim.optimizer.eps=a", "reward=classifier", "+loss.x=1"],
            [
                "seeds: nothing reads this key; did you mean seed?", "trainer.max_steps: 'a' is no int",
                "optim.optimizer.eps: 'a' is no float", "loss.x: nothing reads this key",
                "reward.path: must be given: reward.path=…",
            ],
        ),
        (
            "eval", EVAL,
            ["prompts=a", "against=none", "+data@more.own=prompts", "more.own.path=x", "+more.own.nonsense=1"],
            [
                "prompts: 'a' is no int | None", "against: 'none' is no reference or chosen",
                "more.own.nonsense: nothing reads this key",
            ],
        ),
    ],
)  # fmt: skip
def test_the_source_tells_what_an_import_tells(
    root: str, schemas: dict[str, str], overrides: list[str], lines: list[str]
) -> None:
    """The entry points check before they import; what they build checks again."""
    told = []
    for imports in (False, True):
        with pytest.raises(ValueError, match="cannot be used") as error:
            check(composed(*overrides, root=root), schemas, imports)
        told.append(str(error.value))
    assert told[0] == told[1]
    assert [line for line in lines if f"  {line}" not in told[0].splitlines()] == []


@pytest.mark.parametrize("imports", [False, True])
def test_what_the_source_does_not_say_is_imported(imports: bool) -> None:
    """fractions.Fraction has a __new__, and the last two do not exist."""
    check(OmegaConf.create({"part": {"_target_": "fractions.Fraction", "numerator": 1}}), {}, imports)
    with pytest.raises(ValueError, match=r"part\.numerater: nothing reads this key; did you mean numerator"):
        check(OmegaConf.create({"part": {"_target_": "fractions.Fraction", "numerater": 1}}), {}, imports)
    for name in ("var.losses.var.VARR", "var.nothing.VAR"):
        with pytest.raises(ValueError, match=f"_target_: {name} cannot be imported: "):
            check(OmegaConf.create({"part": {"_target_": name}}), {}, imports)


@pytest.mark.parametrize(
    ("value", "hint", "good"),
    [
        (1, float, True), (True, float, False), (1.5, int, False), (None, int | None, True), ("x", int | None, False),
        ([1, 2], tuple[int, ...], True), (["a"], tuple[int, ...], False), ("a", Literal["a"], True), (True, bool, True),
        (1, bool, False), ("x", str, True), (3, str, False),
    ],
)  # fmt: skip
def test_fits(value: object, hint: object, good: bool) -> None:
    assert fits(value, hint) is good


def test_a_runs_folder_is_the_same_for_the_same_training(tmp_path: Path) -> None:
    """Another logger, store or number of devices goes on with it; another seed or λ is another run."""

    def folder(*overrides: str) -> str:
        return run_dir(str(tmp_path), "m", "d", "l", _root_=composed(f"runs={tmp_path}", *overrides))

    assert folder() == folder("logger=wandb", "store=elsewhere", "annotate=error")
    assert folder() == folder("trainer.devices=2", "trainer.num_nodes=4")
    assert len({folder(), folder("seed=1"), folder("loss.temperature=2"), folder("loss=sft")}) == 4
    Path(first := folder("resume=false")).mkdir()
    assert folder("resume=false") != first


def test_runs_that_differ_in_seeds_alone_are_one_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that W&B draws them as one curve with a band."""
    groups = list[str]()
    monkeypatch.setattr(
        "lightning.pytorch.loggers.WandbLogger", lambda **given: groups.append(given["group"]) or mock.Mock()
    )
    for overrides in ([], ["seed=1"], ["generate.seed=3", "trainer.devices=2"], ["loss.temperature=2"]):
        cfg = composed(f"runs={tmp_path}", "logger=wandb", *overrides)
        loggers(cfg, Path(run_dir(str(tmp_path), "m", "d", "l", _root_=cfg)))
    assert [group.rpartition("-")[0] for group in groups] == ["m_d_l"] * 4
    assert groups[0] == groups[1] == groups[2] != groups[3]


def test_every_rank_of_a_job_has_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """resume=false looks for a free one, and ranks look at different times."""
    cfg = composed(f"runs={tmp_path}", "resume=false")
    names = set()
    for variable, value in (("TORCHELASTIC_RUN_ID", "none"), ("TORCHELASTIC_RUN_ID", "7"), ("SLURM_JOB_ID", "8")):
        monkeypatch.setenv(variable, value)
        names.add(first := run_dir(".", "m", "d", "l", _root_=cfg))
        (tmp_path / first).mkdir()
        assert (run_dir(".", "m", "d", "l", _root_=cfg) == first) == (value != "none")
    assert [name.rpartition("-")[2] for name in sorted(names)] == ["2", "7", "8"]


def test_processes_beside_the_trainers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for overrides in ([], ["trainer.devices=2"], ["trainer.devices=2", "trainer.num_nodes=3"]):
        with pytest.raises(ValueError, match=r"4 processes were started, and trainer\.devices=\d times"):
            Run.compose(composed(*overrides), tmp_path)
    Run.compose(composed("trainer.devices=2", "trainer.num_nodes=2", "data.micro_batch=2"), tmp_path)


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["eval.every_n_steps=0", "eval.judged=-1"], [
            "eval.every_n_steps: must be at least 1, or null (only before and after training), got 0",
            "eval.judged: must be at least 1, or null (all), got -1",
        ]),
        (["seed=-1"], ["seed=-1: a seed is at least 0 and below 2**32"]),
        (["seed=4294967296"], ["seed=4294967296: a seed"]),
        (["init="], ["init is empty (unset shell variable?). Use init=null"]),
    ],
)  # fmt: skip
def test_values_that_mean_nothing_are_told_before_a_model_is_loaded(
    overrides: list[str], lines: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as told:
        Run.compose(composed(*overrides), tmp_path)
    assert [line for line in lines if line not in str(told.value)] == []


def test_a_file_where_a_folder_should_be_is_told_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for fails in (
        lambda: (tmp_path / "file" / "deeper").mkdir(parents=True, exist_ok=True),
        lambda: (tmp_path / "file").mkdir(exist_ok=True),
    ):
        with pytest.raises(SystemExit):
            run_command(fails, "train")
        assert re.fullmatch(
            rf"Error: {tmp_path}/file(/deeper)?: (Not a directory|File exists); choose another folder or file\n",
            capsys.readouterr().err,
        )
    with pytest.raises(FileNotFoundError):  # no fault of a setting
        run_command(lambda: (tmp_path / "none").read_text(), "train")


def test_what_deepspeed_would_refuse_is_told_at_once(tmp_path: Path) -> None:
    """Lightning takes it on CUDA alone; stage 3 leaves no whole model to export."""
    run = Run.compose(composed("strategy=deepspeed", "strategy.stage=3", "trainer.accelerator=cpu"), tmp_path)
    with pytest.raises(ValueError, match="strategy=deepspeed") as told:
        run.trainer()
    assert "trainer.accelerator: DeepSpeed runs on GPUs" in str(told.value)
    assert "strategy.stage: 3 is none of 1, 2" in str(told.value)


def test_git_does_not_hide_the_package() -> None:
    """GitHub's Python .gitignore has a line `var/`."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    hidden = subprocess.run(["git", "check-ignore", "-q", "var/training/module.py"], cwd=ROOT)
    assert hidden.returncode == 1


def test_every_package_is_installed() -> None:
    named = set(
        re.findall(r'"(var[\w.]*)"', (ROOT / "pyproject.toml").read_text().split("packages = [")[1].split("]")[0])
    )
    there = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in (ROOT / "var").rglob("__init__.py")}
    assert named == there


def test_every_loss_and_estimator_has_its_row_in_one_table() -> None:
    """VAR's weights in the README, the other objectives in docs/losses.md."""
    tables = (ROOT / "README.md").read_text() + (ROOT / "docs" / "losses.md").read_text()
    for path in Path(FOLDER, "loss").glob("*.yaml"):
        assert tables.count(f"\n| `{path.stem}` | ") == 1, path.stem


def test_the_readme_names_files_and_keys_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in re.findall(r"`((?:var|conf|tests|experiments)/[\w./-]+)`", readme):
        assert (ROOT / path).exists(), path
    for command, line in re.findall(r"^python (train|annotate|eval|sample)\.py (.*)$", readme, flags=re.M):
        words = shlex.split(re.sub(r"<[^>]*>", "x", line.split("#")[0]))
        words = [re.sub(r"=\w+\(.*\)$", "=1", word) for word in words]  # a sweeper's interval
        roots = {"annotate": "train"}
        composed(*(w.partition(",")[0] for w in words if w != "-m"), root=roots.get(command, command))
