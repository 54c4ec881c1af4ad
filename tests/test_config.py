"""The configuration is checked before anything is loaded, and every error says what to write instead."""

import hashlib
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from tests.helpers.runs import ROOT, composed
from var.config.changes import list_changes
from var.config.check import EVAL, FOLDER, TRAIN, check, fits
from var.config.entry import RENAMED, _expand_home, add_free_keys, list_keys, run_command
from var.config.run_dir import run_dir
from var.config.saved import find_variables, to_saved, to_yaml
from var.config.schema import to_dict
from var.evaluate.run import Evaluation
from var.training.loggers import Curves, make_loggers
from var.training.run import Run
from var.utils.errors import UserError
from var.utils.files import make_file_name

OPTIONS = [path.relative_to(FOLDER) for path in sorted(Path(FOLDER).glob("*/*.yaml")) if path.name[0] != "_"]
REQUIRED = {  # settings that a user must give
    "data/custom": ["data.source._target_=var.data.sources.arithmetic.Arithmetic", "+data.source.problems=9"],
    "data/files": ["data.path=x.jsonl"],
    "data/hha": ["data.folder=x"],
    "data/preferences": ["data.path=someone/pairs"],
    "data/prompts": ["data.path=x.txt"],
    "experiment/hha": ["data.folder=x"],
    "loss/custom": ["loss._target_=var.losses.rgold.RGOLD", "+loss.floor=0.2"],
    "model/hub": ["model.path=someone/model"],
    "model/qwen2.5-32b-int4": ["adapter=lora"],
    "reward/classifier": ["reward.path=someone/rm"],
    "reward/custom": ["reward._target_=var.rewards.verifiers.MathVerify", "+reward.timeout=3"],
    "reward/endpoint": ["reward.client.base_url=http://127.0.0.1:9"],
    "reward/ensemble": ["+reward@reward.members.a=exact_number"],
    "sampler/endpoint": [f"sampler.client.{key}=http://x" for key in ("base_url", "model")],
    "benchmarks/local": ["benchmarks.folder=x"],
}


@pytest.mark.parametrize("path", OPTIONS, ids=str)
def test_every_yaml_composes_and_builds(path: Path, tmp_path: Path) -> None:
    group, option = str(path.parent), f"{path.parent}/{path.stem}"
    places = [f"annotation_cache={tmp_path}/s", f"cache={tmp_path}/c"]
    overrides = [f"{group}={path.stem}", *REQUIRED.get(option, ()), *places]
    if group in ("judge", "benchmarks"):
        evaluation = Evaluation.compose(composed(*overrides, root="eval"))
        assert evaluation.judge or evaluation.benchmarks
        return
    if option == "reward/none":
        assert Evaluation.compose(composed(*overrides, root="eval")).rewards == {}
        return
    try:
        run = Run.compose(composed(*overrides), tmp_path)
    except ValueError:  # the source looks for its file when it is built
        if option not in REQUIRED:
            raise
        check(composed(*overrides), TRAIN)
        return
    assert callable(instantiate(run.cfg.optim.optimizer))
    assert instantiate(run.cfg.optim.schedule).factor(0, 10) > 0


def test_papers_command_composes() -> None:
    """The memory of a model on the hub is known without the hub."""
    cfg = composed("model=qwen2.5-7b", "data=offsetbias", "reward=offsetbias-rm-8b", "loss=var", "strategy=fsdp")
    check(cfg, TRAIN)
    run = Run.compose(cfg, Path("."))
    assert sum(p.numel() for p in run.pretrained.build_meta().parameters()) == 7_615_616_512
    assert cfg.data.global_batch % (8 * cfg.data.micro_batch) == 0


def test_debug_overrides_the_experiment() -> None:
    data = composed("experiment=table5", "debug=limit").data
    assert (data.limit, data.sample) == (64, None)  # of which one may be set
    assert composed("experiment=[table1,hha]", "data.folder=x").data.limit == 200


def test_keys_are_pinned() -> None:
    """A new key is visible in review. To accept it, edit tests/keys.txt."""
    assert sorted(list_keys(composed())) == (ROOT / "tests" / "keys.txt").read_text().split()


@dataclass(frozen=True, kw_only=True)
class Part:
    rate: float
    kind: Literal["a", "b"]
    steps: int | None = None


def test_all_problems_are_reported_at_once() -> None:
    cfg = OmegaConf.create({"part": {"rate": "fast", "kind": "c", "step": 3}, "other": {"rate": 1}, "open": "???"})
    with pytest.raises(UserError, match="invalid configuration") as error:
        check(cfg, {"part": Part, "other": Part})
    assert str(error.value).splitlines()[1:] == [
        "  part.step: nothing reads this key; did you mean steps?",
        "  part.kind: expected a or b, got 'c'",
        "  part.rate: expected float, got 'fast'",
        "  other.kind: this key is missing",
        "  open: must be given: open=…",
    ]


@pytest.mark.parametrize(
    ("root", "schemas", "overrides", "lines"),
    [
        (
            "train", TRAIN,
            ["trainer.max_steps=a", "+seeds=1", "optim.optimizer.eps=a", "reward=classifier", "+loss.x=1"],
            [
                "seeds: nothing reads this key; did you mean seed?", "trainer.max_steps: expected int, got 'a'",
                "optim.optimizer.eps: expected float, got 'a'", "loss.x: nothing reads this key",
                "reward.path: must be given: reward.path=…",
            ],
        ),
        (
            "eval", EVAL,
            ["prompts=a", "against=none", "+data@more.own=prompts", "more.own.path=x", "+more.own.nonsense=1"],
            [
                "prompts: expected int or null, got 'a'", "against: expected reference or chosen, got 'none'",
                "more.own.nonsense: nothing reads this key",
            ],
        ),
    ],
)  # fmt: skip
def test_source_and_import_give_the_same_errors(
    root: str, schemas: dict[str, str], overrides: list[str], lines: list[str]
) -> None:
    messages = []
    for imports in (False, True):
        with pytest.raises(UserError) as error:
            check(composed(*overrides, root=root), schemas, imports)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert [line for line in lines if f"  {line}" not in messages[0].splitlines()] == []


@pytest.mark.parametrize("imports", [False, True])
def test_unclear_source_is_imported(imports: bool) -> None:
    """fractions.Fraction has a __new__, and the last two do not exist."""
    check(OmegaConf.create({"part": {"_target_": "fractions.Fraction", "numerator": 1}}), {}, imports)
    with pytest.raises(UserError, match=r"part\.numerater: nothing reads this key; did you mean numerator"):
        check(OmegaConf.create({"part": {"_target_": "fractions.Fraction", "numerater": 1}}), {}, imports)
    for name, message in (
        ("var.losses.var.VARR", r"var\.losses\.var has no VARR\)\. It has VAR"), ("var.nothing.VAR", ".*PYTHONPATH"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=rf"_target_={name} cannot be imported \({message}"):
            check(OmegaConf.create({"part": {"_target_": name}}), {}, imports)


def test_module_that_raises_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_broken.py").write_text("from var.weights.estimators import Grouped\n\nMINE = Grouped()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as error:
        check(OmegaConf.create({"part": {"_target_": "own_broken.Loss"}}), {}, True)
    assert "TypeError: Grouped.__init__() missing" in str(error.value)
    assert "Its module was found, and raises this error" in str(error.value)


@pytest.mark.parametrize(
    ("value", "hint", "good"),
    [
        (1, float, True), (True, float, False), (1.5, int, False), (None, int | None, True), ("x", int | None, False),
        ([1, 2], tuple[int, ...], True), (["a"], tuple[int, ...], False), ("a", Literal["a"], True), (True, bool, True),
        (1, bool, False), ("x", str, True), (3, str, False), ({}, Part, True), ({}, Any, True), (1, list[int], False),
    ],
)  # fmt: skip
def test_values_fit_types(value: object, hint: object, good: bool) -> None:
    assert fits(value, hint) is good


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("loss.temperatur=1", "Did you mean loss.temperature?"),
        ("trainr.max_steps=1", "Did you mean trainer.max_steps?"),
        ("temperature=1", "Did you mean generate.temperature or loss.temperature or eval.sampling.temperature?"),
        ("data.batch_size=8", "data has the keys responses, max_length, "),
        ("sampler.temperature=1", "sampler has no keys in this configuration."),
        ("sampler.temperature=1", "An argument of your own class needs a plus sign: +sampler.temperature=…"),
        ("batch_size=8", "batch_size: there is no such key. See: python train.py --help"),
        ("judge=alpaca", "judge: there is no such key or group. See: python train.py --help"),
        ("+experiment=table1", "Write experiment=…, without the plus sign."),
        *((old if "=" in old else f"{old}=1", f"{old} was renamed: write {new}.") for old, new in RENAMED.items()),
        ("loss=custom", "loss._target_: must be given: loss._target_=…"),
        ("data.path=a=b", "Hydra cannot read this value. Quote it, for Hydra and for the shell: 'data.path=\"a=b\"'."),
        ("data.path=/x/(1)", "Error: data.path=/x/(1): Hydra cannot read this value"),
        ("data.path=[1", "Error: data.path=[1: Hydra cannot read this value"),
        ("loss", "Error: loss: expected key=value"),
        ("=3", "Error: =3: the key is missing (unset shell variable?). Write key=3"),
    ],
)
def test_errors_say_what_to_write(given: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(sys, "argv", ["train.py", given]), pytest.raises(SystemExit):
        run_command(lambda: check(composed(given), TRAIN))
    assert message in capsys.readouterr().err


def test_secrets_in_the_configuration_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their values would be in model/config.yaml, summary.json, W&B and caches. The message has only their names."""
    monkeypatch.setenv("MY_TOKEN", "5ec7e7")
    cfg = composed(
        "reward=endpoint", "reward.protocol=query", "+reward.request.headers.auth='Bearer ${oc.env:MY_TOKEN}'",
        "+reward.request.user='${oc.env:HOME}'",
        "+judge@eval.judge=mtbench", "eval.judge.client.base_url='http://user:5ec7e7@host/v1'",
        "data=files", "data.path='${oc.env:MY_API_KEY2,none}'", "runs='${oc.env:HOME}/runs'",
        "reward.client.base_url='https://host/score?code=5ec7e7'", "reward.client.model=m",
    )  # fmt: skip
    with pytest.raises(UserError) as error:
        check(cfg, TRAIN)
    lines = str(error.value).splitlines()
    assert lines[0] == "invalid configuration (5):"
    for key, words in (
        ("reward.request.headers.auth", "reads MY_TOKEN from the environment"),
        ("reward.request.user", "reads a variable of the environment. Fields of requests are saved"),
        ("data.path", "reads MY_API_KEY2 from the environment"),
        ("eval.judge.client.base_url", "an address may not have a user name, a password, a query"),
        ("reward.client.base_url", "an address may not have a user name, a password, a query"),
    ):  # fmt: skip
        assert any(line.startswith(f"  {key}: {words}") for line in lines), key
    assert "5ec7e7" not in str(error.value)


def test_values_of_the_environment_are_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of the interpolation is saved, with digits that differ if the value does."""
    monkeypatch.setenv("MY_THING", "5ec7e7")
    monkeypatch.delenv("UNSET", raising=False)
    cfg = composed(
        "model.path=m", "data=files", "data.path='${oc.env:MY_THING}/x'", "seed='${oc.decode:${oc.env:UNSET,3}}'",
        "+loss.more=[1,'${oc.env:MY_THING}']", "runs='${data.path}'",
    )  # fmt: skip
    saved = to_saved(cfg)
    kept = {"model", "reward", "trainer", "eval", "optim"}
    assert {key: saved[key] for key in kept} == {key: to_dict(cfg)[key] for key in kept}
    assert saved["seed"] == 3
    text = saved["data"]["path"]
    assert re.fullmatch(r"\$\{oc\.env:MY_THING\}/x \([0-9a-f]{4}\)", text)
    assert saved["data"]["source"]["path"] == text.replace("${oc.env:MY_THING}/x", "${..path}")
    assert saved["runs"] == text.replace("${oc.env:MY_THING}/x", "${data.path}")
    assert saved["loss"]["more"][0] == 1
    assert "5ec7e7" not in to_yaml(saved)
    assert OmegaConf.to_container(OmegaConf.create(to_yaml(saved))) == saved
    assert set(find_variables(saved["data"], "data")) == {"data.path", "data.source.path"}
    assert to_saved(cfg) == saved
    assert list_changes(to_dict(cfg), saved) == []  # earlier versions saved the values
    monkeypatch.setenv("MY_THING", "other")
    assert {change.key for change in list_changes(saved, to_saved(cfg))} == {"data.source.path", "loss.more"}


@pytest.mark.parametrize(
    "data",
    ["hh_rlhf", "offsetbias", "ultrafeedback", "alpaca_eval", "arena_hard", "mt_bench", "preferences data.path=a/b",
     "files data.path=a/b"],
)  # fmt: skip
def test_everything_from_the_hub_can_be_pinned(data: str) -> None:
    """Also the members of an ensemble, and the rewards of evaluations."""
    pinned = [
        "model=hub", "model.path=a/b", "model.revision=x", f"data={data.split()[0]}", *data.split()[1:],
        "data.source.revision=x", "reward=ensemble", "+reward@reward.members.a=offsetbias-rm-8b",
        "reward.members.a.revision=x",
    ]  # fmt: skip
    check(composed(*pinned, "+reward@eval.reward=offsetbias-rm-8b", "eval.reward.revision=x"), TRAIN)
    second = ["+reward@second_reward=offsetbias-rm-8b", "second_reward.revision=x"]
    check(composed(*pinned, *second, root="eval"), EVAL)


def test_all_misspelled_keys_are_reported_together(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["store=x", "loss.temperatur=1", "loss=dpo", "seed=2", "trainr.max_steps=1", "trainer.devices=1"]
    with mock.patch.object(sys, "argv", ["train.py", *given]), pytest.raises(SystemExit):
        run_command(lambda: composed(*given))
    assert capsys.readouterr().err.splitlines() == [
        "Error: loss.temperatur: there is no such key. loss has the keys beta, label_smoothing.",
        "trainr.max_steps: there is no such key. Did you mean trainer.max_steps?",
        "store was renamed: write annotation_cache.",
    ]


@pytest.mark.parametrize("old", [old for old in RENAMED.values() if "=" not in old])
def test_new_names_exist(old: str) -> None:
    loss = {"loss.drop_zero_variance": "var_online", "loss.centering": "bradley_terry"}.get(old, "var_grouped")
    assert old in list_keys(composed(f"loss={loss}"))


@pytest.mark.parametrize(
    "command", ["train", *(pytest.param(name, marks=pytest.mark.long) for name in ("annotate", "sample", "eval"))]
)
def test_help_names_every_option(command: str) -> None:
    text = composed("hydra.job.name=x", root=command, return_hydra_config=True).hydra.help.template
    options, keys = text.split("key=value")
    groups = {"model", "data", "reward", "sampler", "generate"}
    groups |= {"judge", "benchmarks"} if command == "eval" else {"loss", "optim", "trainer", "experiment", "debug"}
    for path in OPTIONS:
        if path.parent.name in groups:
            assert path.stem in re.split(r"[\s:]+", options.split(f"  {path.parent.name} ")[1]), path
    defaults = re.findall(r"^  ([\w.]+) +.*\((.*)\)$", keys, flags=re.M)
    assert len(defaults) == 10
    for key, value in defaults:
        assert str(OmegaConf.select(composed(root=command), key)) == value.replace("null", "None"), key
    assert "docs/settings.md" in text


def test_run_folder_is_the_same_for_the_same_training(tmp_path: Path) -> None:
    """Another logger, cache or number of devices resumes it. Another seed or λ is another run."""

    def folder(*overrides: str) -> str:
        return run_dir(str(tmp_path), "m", "d", "l", _root_=composed(f"runs={tmp_path}", *overrides))

    assert folder() == folder("logger=wandb", "annotation_cache=elsewhere", "annotate=error")
    assert folder() == folder("trainer.devices=2", "trainer.num_nodes=4")
    assert len({folder(), folder("seed=1"), folder("loss.temperature=2"), folder("loss=sft")}) == 4
    Path(first := folder("resume=false")).mkdir()
    assert folder("resume=false") != first


def test_runs_that_differ_only_in_seeds_are_one_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B then draws them as one curve with a band."""
    groups = list[str]()
    monkeypatch.setattr(
        "var.training.trackers.Wandb", lambda _, **options: groups.append(options["group"]) or mock.Mock()
    )
    for overrides in ([], ["seed=1"], ["generate.seed=3", "trainer.devices=2"], ["loss.temperature=2"]):
        cfg = composed(f"runs={tmp_path}", "logger=wandb", *overrides)
        folder = Path(run_dir(str(tmp_path), "m", "d", "l", _root_=cfg))
        make_loggers(cfg, folder, Curves(folder / "metrics.csv", None))
    assert [group.rpartition("-")[0] for group in groups] == ["m_d_l"] * 4
    assert groups[0] == groups[1] == groups[2] != groups[3]


def test_all_ranks_of_a_job_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """resume=false looks for an unused folder, and ranks look at different times."""
    cfg = composed(f"runs={tmp_path}", "resume=false")
    names = set()
    for variable, value in (("TORCHELASTIC_RUN_ID", "none"), ("TORCHELASTIC_RUN_ID", "7"), ("SLURM_JOB_ID", "8")):
        monkeypatch.setenv(variable, value)
        names.add(first := run_dir(".", "m", "d", "l", _root_=cfg))
        (tmp_path / first).mkdir()
        assert (run_dir(".", "m", "d", "l", _root_=cfg) == first) == (value != "none")
    assert [name.rpartition("-")[2] for name in sorted(names)] == ["2", "7", "8"]


def test_number_of_processes_must_match_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for overrides in ([], ["trainer.devices=2"], ["trainer.devices=2", "trainer.num_nodes=3"]):
        with pytest.raises(UserError, match=r"4 processes were started, but trainer\.devices=\d times"):
            Run.compose(composed(*overrides), tmp_path)
    Run.compose(composed("trainer.devices=2", "trainer.num_nodes=2", "data.micro_batch=2"), tmp_path)


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["eval.every_n_steps=0", "eval.judged=-1"], [
            "eval.every_n_steps: must be at least 1, or null (only before and after training), got 0",
            "eval.judged: must be at least 1, or null (all), got -1",
        ]),
        (["seed=-1"], ["seed=-1: a seed must be at least 0 and below 2**32"]),
        (["seed=4294967296"], ["seed=4294967296: a seed"]),
        (["seed=-1", "optim.optimizer.lr=-1", "data.micro_batch=0", "generate.temperature=-1"], [
            "seed=-1: a seed must be at least 0", "Invalid learning rate: -1",
            "data.micro_batch: must be at least 1", "temperature must be at least 0 (0 is greedy)",
        ]),
        (["init="], ["init is empty (unset shell variable?). Use init=null"]),
        (["cache=", "model.path="], ["cache: is empty (unset shell variable?)", "model.path: is empty"]),
        (["data.micro_batch=0"], ["data.micro_batch: must be at least 1, got 0"]),
        (["trainer.max_steps=-3", "trainer.log_every_n_steps=0"], [
            "trainer.max_steps: must be at least -1, got -3", "trainer.log_every_n_steps: must be at least 1, got 0",
        ]),
        (["model.learning_rate=null"], ["optim.optimizer.lr, which is model.learning_rate unless it is set: expected"]),
        (["model.learning_rate=.nan"], ["expected a number, got .nan"]),
        (["data.limit=0"], ["data.limit: must be at least 1, or null for all rows, got 0"]),
        (["trainer.max_steps=0"], ["trainer.max_steps: 0 steps train nothing; -1 trains for all epochs"]),
        (["optim.optimizer.lr=-1"], ["optim.optimizer cannot be built: Invalid learning rate: -1"]),
        (["reward._target_=var.rewards"], ["_target_=var.rewards is not a class or a function"]),
    ],
)  # fmt: skip
def test_invalid_values_are_reported_before_loading(overrides: list[str], lines: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        Run.compose(composed(*overrides), tmp_path)
    assert [line for line in lines if line not in str(error.value)] == []


def test_long_names_are_shortened_with_a_hash(tmp_path: Path) -> None:
    """The names of runs that differ only after the limit differ, and every file system can hold them."""
    cfg = composed(f"runs={tmp_path}")
    names = {run_dir("r", "m" * 300 + end, data, "d", _root_=cfg) for end in "xy" for data in ("a/b", "ä" * 200)}
    assert len(names) == 4
    assert all(len(name.removeprefix("r/").encode()) <= 200 and name.count("/") == 1 for name in names)
    assert run_dir("r", "m", "a/b", "l", _root_=cfg).startswith("r/m_a-b_l-")
    assert make_file_name("ä" * 100, 32) == f"{'ä' * 11}-{hashlib.sha256(('ä' * 100).encode()).hexdigest()[:8]}"
    assert make_file_name("a" * 32, 32) == "a" * 32


def test_runs_without_a_folder_is_an_error(tmp_path: Path) -> None:
    """With `runs=` of an unset variable the run's folder would be in /."""
    cfg = composed(f"runs={tmp_path}")
    cfg.runs = ""
    with pytest.raises(UserError, match=r"runs: is empty \(unset shell variable\?\)"):
        run_dir("", "m", "d", "l", _root_=cfg)


def test_path_that_is_too_long_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command((Path("x" * 300) / "config.json").exists)
    path = f"{'x' * 300}/config.json"
    assert capsys.readouterr().err == f"Error: {path}: File name too long; choose another folder or file\n"


def test_file_in_place_of_a_folder_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for fails in (
        lambda: (tmp_path / "file" / "deeper").mkdir(parents=True, exist_ok=True),
        lambda: (tmp_path / "file").mkdir(exist_ok=True),
        lambda: Path("/proc/x").mkdir(parents=True),
    ):
        with pytest.raises(SystemExit):
            run_command(fails)
        assert re.fullmatch(
            rf"Error: (/proc/x|{tmp_path}/file(/deeper)?): (Not a directory|File exists|No such file or directory); "
            r"choose another folder or file\n",
            capsys.readouterr().err,
        )
    with pytest.raises(FileNotFoundError):  # not caused by a setting
        run_command(lambda: (tmp_path / "none").read_text())


def test_deepspeed_settings_are_checked_at_once(tmp_path: Path) -> None:
    """Lightning accepts them only on CUDA, and after stage 3 no rank has a complete model to export."""
    run = Run.compose(composed("strategy=deepspeed", "strategy.stage=3", "trainer.accelerator=cpu"), tmp_path)
    with pytest.raises(UserError, match="strategy=deepspeed") as error:
        run.trainer()
    assert "trainer.accelerator: " in str(error.value)
    assert "strategy.stage: must be 1 or 2, got 3" in str(error.value)


def test_git_tracks_the_package_and_setuptools_finds_it() -> None:
    """GitHub's Python .gitignore has a line `var/`. Setuptools finds folders with an __init__.py."""
    folders = {path.parent for path in (ROOT / "var").rglob("*.py") if path.parent.name != "tasks"}
    assert folders == {path.parent for path in (ROOT / "var").rglob("__init__.py")}
    if (ROOT / ".git").exists():
        assert subprocess.run(["git", "check-ignore", "-q", "var/training/module.py"], cwd=ROOT).returncode == 1


def test_every_loss_has_one_table_row() -> None:
    """VAR's estimators in docs/estimators.md, the other losses in docs/losses.md."""
    estimators, losses = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("estimators", "losses"))
    tables = estimators.partition("## Recommendations")[0] + losses
    for path in OPTIONS:
        assert path.parent.name != "loss" or path.stem == "custom" or tables.count(f"\n| `{path.stem}` | ") == 1, path


def test_readme_names_existing_files_and_keys() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in re.findall(r"`((?:var|conf|tests|experiments)/[\w./-]+)`", readme):
        assert (ROOT / path).exists(), path
    for command, line in re.findall(r"^python (train|annotate|eval|sample)\.py (.*)$", readme, flags=re.M):
        words = shlex.split(re.sub(r"<[^>]*>", "x", line.split("#")[0]))
        words = [re.sub(r"=\w+\(.*\)$", "=1", word) for word in words]  # a sweeper's interval
        composed(*(w.partition(",")[0] for w in words if w != "-m"), root=command)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["model=qwen2.5-32b-int4"], "qwen2.5-32b-int4"),
        (["model=hub", "model.path=Qwen/Qwen3-8B"], "qwen3-8b"),
        (["model=qwen2.5-7b", "model.path=/data/My-Qwen/"], "my-qwen"),
        (["model.path=runs/tiny_files_sft-0123/model"], "tiny_files_sft-0123"),
        (["model.path=/c/models--Qwen--Qwen3-8B/snapshots/0123"], "qwen3-8b"),
        (["model.path=someone/model", "model.name=mine"], "mine"),
    ],
)
def test_name_of_a_model_follows_its_path(overrides: list[str], name: str) -> None:
    assert composed(*overrides).model.name == name


def test_missing_path_of_a_hub_model_is_reported() -> None:
    with pytest.raises(UserError, match=r"model\.path: must be given: model\.path=…"):
        check(composed("model=hub"), TRAIN, imports=False)


def test_home_folder_is_expanded_in_values() -> None:
    home = str(Path.home())
    assert _expand_home("model.path=~/m") == f"model.path={home}/m"
    assert _expand_home("data.path=~/a.jsonl,~/b.jsonl") == f"data.path={home}/a.jsonl,{home}/b.jsonl"
    for word in ("~data.limit", "model.path=a~/b", "-m"):
        assert _expand_home(word) == word


def test_mappings_with_keys_of_the_user_need_no_plus_sign():
    """Hydra sets no key that is not in the configuration without it."""
    for word in (
        "model.chat_template_kwargs={thinking: false}",
        "sampler.request.top_k=-1",
        "eval.judge.request={a: 1}",
    ):
        assert add_free_keys(word) == f"++{word}"
    for word in (
        "+sampler.request.top_k=-1",
        "~reward.request",
        "data=files",
        "--help",
        "request=1",
        "x.y=a.request=1",
    ):
        assert add_free_keys(word) == word
