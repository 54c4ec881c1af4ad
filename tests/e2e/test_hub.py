"""The command of the paper with models, reward model and data from a hub (a mirror), offline, and from folders."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.benchmarks import write_alpaca_eval, write_arena_hard, write_mt_bench
from tests.helpers.cli import write_to
from tests.helpers.hub_server import Hub, Repository, client_environment, serve_hub, write_repositories
from tests.helpers.runs import ROOT, run_folder, same_folders

pytestmark = pytest.mark.e2e

GROUPS = shlex.split("model=qwen2.5-7b loss=var data=offsetbias reward=offsetbias-rm-8b")
SMALL = shlex.split(
    "trainer.accelerator=cpu data.micro_batch=4 data.global_batch=8 data.validation_prompts=2 trainer.epochs=1 "
    "eval.sampling.responses=1 generate.max_new_tokens=3 trainer.log_every_n_steps=1"
)


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_repositories(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def hub(repositories: Any) -> Iterator[Hub]:
    models, sets = repositories
    with serve_hub(models=models, datasets=sets, prefix="/mirror") as server:
        yield server


def train(hub: Hub, home: Path, *overrides: str, status: int = 0, **environment: str) -> str:
    """Run train.py in a process that uses the hub, with its cache in `home`; return what it printed."""
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, *overrides]
    variables = client_environment(hub, home, **environment)
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.long
def test_dry_run_downloads_no_weights(hub: Hub, tmp_path: Path) -> None:
    printed = train(hub, tmp_path, *GROUPS, *write_to(tmp_path), "debug=dry")
    assert "7,615,616,512" in printed
    assert hub.downloads(".safetensors") == []
    printed = train(hub, tmp_path, *GROUPS, *write_to(tmp_path), "debug=dry", "model=hub", "model.path=Qwen/Qwen2.5-7B")
    assert "7,615,616,512" not in printed  # the sizes in config.json


@pytest.mark.long
def test_training_from_the_hub_its_cache_and_folders(hub: Hub, repositories: Any, tmp_path: Path) -> None:
    """A download that breaks is resumed by the same command, and the three sources train the same model."""
    home, models = tmp_path / "home", repositories[0]
    online, offline, folders = (tmp_path / name for name in ("online", "offline", "folders"))
    hub.breaks, hub.keeps_breaking = {"model.safetensors": 1000}, True
    printed = train(hub, home, *GROUPS, *write_to(online), status=1)
    assert "Error: model.path=Qwen/Qwen2.5-7B: not on this machine, and it could not be downloaded" in printed
    hub.breaks.clear()
    before = hub.sent.copy()
    train(hub, home, *GROUPS, *write_to(online))
    assert run_folder(online / "runs").name.startswith("qwen2.5-7b_offsetbias_var-")
    for name in hub.downloads(".safetensors"):
        repository, file = models[name.rpartition("/")[0]], name.rpartition("/")[2]
        assert hub.sent[name] - before[name] in (0, (repository.folder / file).stat().st_size), name
    hub.forget()
    train(hub, home, *GROUPS, *write_to(offline), HF_HUB_OFFLINE="1")
    assert not hub.requests
    rm, data = (models[name].folder for name in ("NCSOFT/Llama-3-OffsetBias-RM-8B", "Qwen/Qwen2.5-7B"))
    pairs = repositories[1]["NCSOFT/offsetbias"].folder / "data"
    paths = f"model.path={data}", f"reward.path={rm}", f"data.path={pairs}"
    train(hub, tmp_path / "empty", *GROUPS, *paths, *write_to(folders))
    assert not hub.requests
    assert run_folder(folders / "runs").name.startswith("qwen_offsetbias_var-")
    same_folders(*(run_folder(place / "runs") for place in (online, offline)), "train/loss")
    same_folders(*(run_folder(place / "runs") for place in (online, folders)))
    summaries = [json.loads((run_folder(p / "runs") / "summary.json").read_text()) for p in (online, offline, folders)]
    assert len({summary["hashes"]["weights"] for summary in summaries}) == 1
    for name, key in (("Qwen/Qwen2.5-7B", "weights"), ("NCSOFT/Llama-3-OffsetBias-RM-8B", "reward_weights")):
        used = [f"{name} at commit {models[name].commit}"] * 2 + [str(models[name].folder.resolve())]
        assert [summary["ran"][key] for summary in summaries] == used


READ = """
import sys
from var.data.sources.offsetbias import OffsetBias
source = OffsetBias(revision=sys.argv[1] if len(sys.argv) > 1 else None)
print(len(list(source.records())), source.origin)
"""


def test_commit_of_a_data_set_is_recorded_and_can_be_set(hub: Hub, repositories: Any, tmp_path: Path) -> None:
    commit = repositories[1]["NCSOFT/offsetbias"].commit

    def read(*revision: str, **environment: str) -> str:
        variables = client_environment(hub, tmp_path / "home", **environment)
        command = [sys.executable, "-c", READ, *revision]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
        return done.stdout + done.stderr

    assert f"24 NCSOFT/offsetbias[train] at commit {commit}" in read()
    assert f"24 NCSOFT/offsetbias@{commit}[train] at commit {commit}" in read(commit)
    assert "NCSOFT/offsetbias has no such revision" in read("0" * 40)
    assert f"24 NCSOFT/offsetbias[train] at commit {commit}" in read(HF_HUB_OFFLINE="1")


READ_BENCHMARKS = """
from pathlib import Path
from var.data.read import read
from var.data.sources.benchmarks import AlpacaEval, ArenaHard, MTBench
from var.utils.errors import UserError
for source in (AlpacaEval(), ArenaHard(), MTBench(), MTBench(baseline="gpt-4")):
    try:
        print(len(read(source, Path("CACHE"))), source.origin)
    except UserError as error:
        print(error)
"""


def test_benchmarks_for_judges_are_downloaded_once(tmp_path: Path) -> None:
    """From data sets and a space, two files at most of each. A baseline without a file is an error."""
    write_alpaca_eval(tmp_path / "alpaca" / "alpaca_eval_gpt4_baseline.json")
    write_arena_hard(tmp_path / "arena" / "data" / "arena-hard-v0.1", new=True)
    write_mt_bench(tmp_path / "mt" / "data" / "mt_bench")
    sets = {
        "tatsu-lab/alpaca_eval": Repository(tmp_path / "alpaca"),
        "lmarena-ai/arena-hard-auto": Repository(tmp_path / "arena"),
    }
    spaces = {"lmsys/mt-bench": Repository(tmp_path / "mt")}

    def read(hub: Hub, **environment: str) -> str:
        variables = client_environment(hub, tmp_path / "home", **environment)
        command = [sys.executable, "-c", READ_BENCHMARKS.replace("CACHE", str(tmp_path / "cache"))]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    lines = [f"3 {name} at commit {one.commit}" for name, one in (sets | spaces).items()]
    with serve_hub(datasets=sets, spaces=spaces) as hub:
        *read_lines, missing = read(hub).splitlines()
        assert read_lines == lines
        assert missing.startswith(
            "data: lmsys/mt-bench/data/mt_bench/model_answer/gpt-4.jsonl: lmsys/mt-bench lacks a file that is needed"
        )
        assert f"Check the files at {hub.url}/spaces/lmsys/mt-bench/tree/main, or set data.path to a" in missing
        assert len(hub.downloads()) == 5
        hub.forget()
        *read_lines, missing = read(hub, HF_HUB_OFFLINE="1").splitlines()
        assert read_lines == lines
        assert "run `hf download lmsys/mt-bench --repo-type space` where there is a network" in missing
        assert not hub.requests


READ_MODELS = """
import sys
from tests.helpers.models import pretrained
from var.rewards.classifier import Classifier
from var.rewards.ensemble import Ensemble
reward = Classifier(path="NCSOFT/Llama-3-OffsetBias-RM-8B", revision=sys.argv[3] or None)
print(pretrained("Qwen/Qwen2.5-7B", sys.argv[1], revision=sys.argv[2] or None).origin)
print(reward.origin, Ensemble(members={"a": reward}).origin)
"""


def test_commits_of_models_are_recorded_and_can_be_set(hub: Hub, repositories: Any, tmp_path: Path) -> None:
    """Those of the policy and of a reward model."""
    names = ("Qwen/Qwen2.5-7B", "NCSOFT/Llama-3-OffsetBias-RM-8B")
    commits = [repositories[0][name].commit for name in names]

    def read(*revisions: str) -> str:
        command = [sys.executable, "-c", READ_MODELS, str(tmp_path), *revisions]
        variables = client_environment(hub, tmp_path / "home")
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
        return done.stdout + done.stderr

    policy, reward = (f"{name} at commit {commit}" for name, commit in zip(names, commits, strict=True))
    for revisions in (["", ""], commits, ["main", "main"]):
        printed = read(*revisions)
        assert f"{policy}\n" in printed, printed
        assert f"{reward} {{'a': '{reward}'}}" in printed, printed
    assert "reward.revision=nothing: NCSOFT/Llama-3-OffsetBias-RM-8B has no such revision" in read("", "nothing")
    assert hub.downloads(".safetensors") == []
