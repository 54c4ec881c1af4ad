"""The commands, driven as a user does, on a tiny random model: what they print, leave behind and refuse."""

import csv
import importlib.util
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

from notebooks.tiny import byte_tokenizer
from tests.helpers.models import saved, tiny_config
from tests.helpers.runs import ROOT
from var.config.entry import run_command
from var.report.read import find_records
from var.report.write import plot

pytestmark = pytest.mark.e2e


def run(command: str, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in this process, as `python command overrides` would run it; imports are paid once."""
    spec = importlib.util.spec_from_file_location(command.removesuffix(".py"), ROOT / command)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out, err, code = io.StringIO(), io.StringIO(), 0
    arguments = [str(ROOT / command), *overrides]
    patched = mock.patch.object(sys, "argv", arguments), mock.patch.dict(os.environ, environment)
    with patched[0], patched[1], redirect_stdout(out), redirect_stderr(err):
        try:
            run_command(module.main)
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            GlobalHydra.instance().clear()
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def spawn(*command: str) -> "subprocess.Popen[str]":
    """A process of its own, for what kills or multiplies it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *command], text=True, env=environment, **pipes)


def refused(message: str, *overrides: str, **environment: str) -> None:
    """The command ends with one clear error that has `message`, without a traceback."""
    done = run("train.py", *overrides, **environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert message in done.stderr
    assert sum(line.startswith("Error: ") for line in done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(1)
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = []
    for i in range(10):
        responses = [{"text": "ab " * draw.randint(1, 4) + str(k), "score": draw.gauss(0, 1)} for k in range(2)]
        lines.append(json.dumps({"id": f"r{i}", "prompt": f"{i}?", "answer": "1", "responses": responses}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def base(tiny_folder: Path, tmp_path: Path) -> list[str]:
    return [
        f"model.path={tiny_folder}",
        f"annotation_cache={tmp_path}/store", f"cache={tmp_path}/cache", f"runs={tmp_path}/runs",
        "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "data.validation_prompts=2", "data.micro_batch=4",
        "data.global_batch=4", "eval.sampling.responses=2", "eval.sampling.max_new_tokens=3",
    ]  # fmt: skip


@pytest.fixture
def own(base: list[str], rows: Path) -> list[str]:
    return [*base, "data=files", f"data.path={rows}", "reward=exact_number", "loss=var_grouped"]


def only(folder: Path) -> Path:
    (found,) = (p for p in folder.iterdir() if p.is_dir())
    return found


def test_a_run_leaves_its_folder(own: list[str], tmp_path: Path) -> None:
    done = run("train.py", *own)
    assert done.returncode == 0, done.stderr
    folder = only(tmp_path / "runs")
    for name in (
        ".hydra/config.yaml",
        "summary.json",
        "metrics.csv",
        "samples.jsonl",
        "plots/curves.png",
        "model/README.md",
    ):
        assert (folder / name).stat().st_size, name
    summary = json.loads((folder / "summary.json").read_text())
    for when in ("before", "after", "gain"):
        assert set(summary["validation"]["reward"][when]) == {"mean", "se"}
    assert {"kl", "length", "tokens_per_second", "ess", "hashes", "versions", "seeds", "commit"} <= set(summary)
    for shown in ("validation reward", "KL to the reference", "response length", "tokens per second",
                  "effective sample size", "groups without signal", str(folder)):  # fmt: skip
        assert shown in done.stdout
    sample = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])
    assert {"prompt", "before", "after"} <= set(sample)

    again = run("train.py", *own)
    assert again.returncode == 0
    assert "This very run is finished" in again.stdout


def test_a_finished_run_whose_data_was_edited_says_so(options: list[str], rows: Path, tmp_path: Path) -> None:
    """The folder's name has the data's path, and not what is in it."""
    data = tmp_path / "own rows.jsonl"
    data.write_bytes(rows.read_bytes())
    command = ["train.py", *options, f"data.path='{data}'", "trainer.max_steps=1"]
    assert run(*command).returncode == 0
    assert "was written after this run ended" not in run(*command).stdout
    data.write_text(data.read_text().replace("question", "request"))
    again = run(*command)
    assert again.returncode == 0
    assert f"{data} was written after this run ended: resume=false trains on what is there now" in again.stdout


def test_a_real_run_is_reported(own: list[str], tmp_path: Path) -> None:
    """What train.py leaves is what reports read."""
    assert run("train.py", *own, "loss.min_weight=0.1").returncode == 0
    assert run("report.py", f"{tmp_path}/runs", "--out", f"{tmp_path}/out").returncode == 0
    (one,) = find_records([tmp_path / "runs"]).runs
    assert "loss.min_weight=0.1" in one.overrides
    assert not any(line.startswith(("runs=", "annotation_cache=", "cache=")) for line in one.overrides)
    assert {"reward before", "reward after", "gain, paired", "KL, nats", "ESS/n", "tokens/s"} <= one.measures.keys()
    assert {"train/loss", "train/weight/ess", "validation/reward"} <= one.curves.keys()
    assert len(one.samples) == 2
    assert one.plan["micro"].shape[1] == 4
    assert (tmp_path / "out" / "figures" / "frontier.png").stat().st_size
    (only,) = (tmp_path / "out" / "pages").iterdir()
    assert "exact_number" in only.read_text() or "ExactNumber" in only.read_text()
    plot([one.folder], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size


OWN_REWARD = '''
from dataclasses import dataclass

@dataclass(frozen=True, kw_only=True)
class Distinct:
    """The number of distinct characters: a reward of one's own, outside the project."""

    scores_text = True
    identity = {"program": "distinct"}

    def __call__(self, prompts, responses, answers):
        return [float(len(set(text))) for text in responses]
'''


def test_a_second_run_samples_and_scores_nothing(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another λ, learning rate, estimator or loss reads what the first one stored (huggingface/trl #3985)."""
    more = [*base, "data.source.problems=12", "generate.max_new_tokens=4"]
    more += ["reward=exact_number", "reward._target_=own_reward.Distinct"]
    (tmp_path / "own_reward.py").write_text(OWN_REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    first = run("train.py", *more, "loss=var")
    assert first.returncode == 0, first.stderr
    for other in (["loss=var", "loss.temperature=3"], ["loss=var", "optim.optimizer.lr=1e-3"],
                  ["loss=var_grouped"], ["loss=dpo", "data.micro_batch=2", "data.global_batch=2"]):  # fmt: skip
        done = run("train.py", *more, *other)
        assert done.returncode == 0, done.stderr
        assert "Sampling" not in done.stdout
        assert "Scoring" not in done.stdout
        assert "Evaluating the start" not in done.stdout
    summaries = [json.loads(p.read_text()) for p in (tmp_path / "runs").glob("*/summary.json")]
    computed = [s["computed"] for s in summaries]
    assert len(summaries) == 5
    assert sorted(len(c) for c in computed) == [0, 0, 0, 1, 5], computed  # DPO alone adds its own pairs


def test_annotate_fills_ahead_and_refuse_names_it(own: list[str], tmp_path: Path) -> None:
    refused("Write them once, every later run reads them: python annotate.py ", *own, "loss=dpo", "annotate=error")
    done = run("annotate.py", *own, "loss=dpo")
    assert done.returncode == 0, done.stderr
    assert "Reference log-probabilities" in done.stdout
    done = run("train.py", *own, "loss=dpo", "annotate=error")
    assert done.returncode == 0, done.stderr


def test_annotate_samples_nothing_for_a_reward_model(own: list[str]) -> None:
    done = run("annotate.py", *own, "loss=bradley_terry", "reward=score")
    assert done.returncode == 0, done.stderr
    assert "Evaluating the start" not in done.stdout


def test_annotate_shares_the_work_of_its_ranks(own: list[str], tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "annotate.py"))
    process = spawn(*launcher, *own, "loss=dpo", "trainer.devices=2", "data.global_batch=8")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    shards = list((tmp_path / "store" / "reference_logps").glob("*/*.parquet"))
    assert len(shards) == 2
    assert "nothing, the store held it all" in run("annotate.py", *own, "loss=dpo").stdout


def test_debug_presets(own: list[str], tmp_path: Path) -> None:
    dry = run("train.py", *own, "loss=dpo", "debug=dry", "reward=score")
    assert dry.returncode == 0, dry.stderr
    for shown in (
        "reference_logps [N], nats",
        "Memory a device",
        "reference log-probabilities: 0 of 16",
        "⟦ab",
        "<end>⟧",
    ):
        assert shown in dry.stdout, dry.stdout
    assert not list((tmp_path / "store").glob("*/*/*.parquet"))
    dry = run("train.py", *own, "debug=dry", "data.responses=sampled", "data.validation_prompts=0")
    assert "⟦… the responses are sampled first …⟧" in dry.stdout, dry.stderr
    limits = ["data.limit=10", "data.validation_prompts=2"]
    for preset in ("step", "limit", "overfit", "profile"):
        done = run("train.py", *own, f"debug={preset}", *limits)
        assert done.returncode == 0, done.stderr
    steps = {json.loads(p.read_text())["steps"] for p in (tmp_path / "runs").glob("*/summary.json")}
    assert min(steps) == 1


def test_a_sweep_gives_each_job_its_folder(own: list[str], tmp_path: Path) -> None:
    done = run("train.py", "-m", *own, "loss=sft,var_grouped", "logger=wandb")
    assert done.returncode == 0, done.stderr
    folders = sorted(p.parent.name for p in (tmp_path / "runs").glob("*/summary.json"))
    assert [name.rsplit("-", 1)[0] for name in folders] == ["smollm2-135m_files_sft", "smollm2-135m_files_var_grouped"]
    assert len(list((tmp_path / "runs").glob("*/wandb/offline-run-*"))) == 2  # one W&B run a job (wandb #1314)


def test_several_devices_in_a_sweep_are_refused(own: list[str]) -> None:
    """hydra #2070, Lightning PR #18175: each rank would start the whole sweep again."""
    refused(
        "each of them would start the whole sweep again",
        "-m",
        *own,
        "loss=sft,dpo",
        "trainer.devices=2",
        "data.global_batch=8",
    )


def test_help_is_readable() -> None:
    done = run("train.py", "--help")
    assert done.returncode == 0
    for shown in ("python train.py loss=sft", "loss: ", "var_grouped", "model: "):
        assert shown in done.stdout


@pytest.mark.parametrize("signal_at", [3, pytest.param(7, marks=pytest.mark.long)])
def test_a_killed_run_goes_on_by_the_same_command(signal_at: int, own: list[str], tmp_path: Path) -> None:
    """SIGKILL, then the same command: weights equal to the unbroken run's to the last bit, every row once."""
    common = [*own, "loss=sft", "data.micro_batch=2", "data.global_batch=2", "trainer.checkpoint_every_n_steps=2",
              "data.validation_prompts=1"]  # fmt: skip
    straight = run("train.py", *common, f"runs={tmp_path}/straight")
    assert straight.returncode == 0, straight.stderr
    process = spawn(str(ROOT / "train.py"), *common, f"runs={tmp_path}/killed")
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        metrics = list((tmp_path / "killed").glob("*/metrics.csv"))
        if metrics and sum(1 for _ in metrics[0].open()) > signal_at:
            break
        time.sleep(0.005)
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = run("train.py", *common, f"runs={tmp_path}/killed")
    assert again.returncode == 0, again.stderr
    one, two = only(tmp_path / "straight"), only(tmp_path / "killed")
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert all(torch.equal(a[name], b[name]) for name in a)
    steps = [
        [row["step"] for row in csv.DictReader((folder / "metrics.csv").open()) if row["train/loss"]]
        for folder in (one, two)
    ]
    assert steps[0] == steps[1]


def test_the_loss_in_the_documents_trains(own: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe of docs/losses.md, as it stands there: one Python file and one YAML."""
    page = (ROOT / "docs" / "losses.md").read_text()
    code = page.split("## Write your own")[1].split("```python\n")[1].split("```")[0]
    imports = """
from dataclasses import dataclass
from torch import Tensor
from var.losses.weighted import Metrics
from var.requirements import Need
from var.models.packing import Packed
"""
    (tmp_path / "slic.py").write_text(imports + code)
    monkeypatch.syspath_prepend(tmp_path)
    done = run("train.py", *own, "loss=dpo", "~loss.beta", "~loss.label_smoothing", "+loss.margin=0.5",
               "loss._target_=slic.SLiC", "reward=score")  # fmt: skip
    assert done.returncode == 0, done.stderr


class TestBadInput:
    """Each gives one clear error before the first expensive step."""

    def test_a_missing_file(self, own: list[str], tmp_path: Path) -> None:
        refused("nowhere.jsonl", *own, f"data.path={tmp_path}/nowhere.jsonl")

    def test_malformed_rows_all_at_once(self, own: list[str], rows: Path, tmp_path: Path) -> None:
        lines = rows.read_text().splitlines()
        lines[2] = lines[2][:-5]
        lines[5] = lines[5].replace('"score"', '"scoer"')
        lines[7] = json.dumps({"id": "nan", "prompt": "?", "responses": [{"text": "a", "score": float("nan")}]})
        lines[8] = json.dumps({"id": "empty", "prompt": "?", "responses": [" "]})
        lines[9] = lines[0]
        bad = tmp_path / "bad.jsonl"
        bad.write_text("\n".join(lines))
        done = run("train.py", *own, f"data.path={bad}")
        assert done.returncode == 1
        for line in (3, 6, 8, 9, 10):
            assert f"bad.jsonl:{line}:" in done.stderr, done.stderr
        for what in ("scoer", "nan", "is empty", "id 'r0' is also the id of"):
            assert what in done.stderr
        assert not list((tmp_path / "store").glob("*/*/*.parquet"))

    def test_an_unknown_model(self, own: list[str]) -> None:
        refused(
            "is not on this machine and could not be downloaded", *own, "model.path=nobody/nothing", HF_HUB_OFFLINE="1"
        )

    def test_an_unknown_group_option_lists_the_known(self, own: list[str]) -> None:
        refused("var_grouped", *own, "loss=vra")

    def test_a_misspelt_key_suggests_the_nearest(self, own: list[str]) -> None:
        refused("Did you mean loss.temperature?", *own, "loss.temperatur=1")
        refused("did you mean temperature?", *own, "+loss.temperatur=1")

    def test_wrong_types_all_at_once(self, own: list[str]) -> None:
        done = run(
            "train.py", *own, "loss.temperature=hot", "trainer.epochs=two", "data.overlong=shrink", "reference=alive"
        )
        assert done.returncode == 1
        for what in ("loss.temperature: expected float, got 'hot'", "trainer.epochs: expected int, got 'two'",
                     "data.overlong: expected drop or truncate or error, got 'shrink'",
                     "reference: expected stored or live, got 'alive'"):  # fmt: skip
            assert what in done.stderr, done.stderr

    def test_settings_that_clash(self, own: list[str]) -> None:
        refused("must be a multiple of data.micro_batch=4 times 2 processes", *own, "trainer.devices=2")
        refused("this loss compares pairs", *own, "loss=dpo", "data.responses=all")
        refused("reward.mismatch_gap", *own, "reward=score", "loss=var")

    def test_a_reward_model_without_template(self, own: list[str], tmp_path: Path) -> None:
        from transformers import LlamaForSequenceClassification

        model = LlamaForSequenceClassification(tiny_config(num_labels=1))
        folder = saved(tmp_path / "rm", model, byte_tokenizer(template=None))
        refused(
            "has no chat template, so its scores would be meaningless",
            *own,
            "reward=classifier",
            f"reward.path={folder}",
        )

    def test_overlong_rows(self, own: list[str], rows: Path, tmp_path: Path) -> None:
        long = tmp_path / "long.jsonl"
        extra = [json.dumps({"id": "long", "prompt": "?", "responses": ["x" * 90]}),
                 json.dumps({"id": "full", "prompt": "y" * 90, "responses": ["x"]})]  # fmt: skip
        long.write_text(rows.read_text() + "\n" + "\n".join(extra))
        more = [*own, f"data.path={long}", "data.max_length=40", "loss=sft", "data.validation_prompts=1"]
        refused("row long#0: it has", *more, "data.overlong=error")
        refused("row full#0: its prompt alone has", *more, "data.overlong=truncate")
        dropped = run("train.py", *more)
        assert dropped.returncode == 0, dropped.stderr
        assert "sequences dropped as overlong: 1" in dropped.stdout
        assert "sequences whose prompt fills the limit: 1" in dropped.stdout

    def test_a_reward_that_compares_and_rows_without_an_answer(
        self, own: list[str], rows: Path, tmp_path: Path
    ) -> None:
        """Told before anything is sampled, by training on sampled answers, by validation alone, and by eval.py."""
        (bare := tmp_path / "bare.jsonl").write_text(rows.read_text().replace('"answer": "1", ', ""))
        own = [*own, f"data.path={bare}"]
        for more in (["data.responses=sampled"], ["loss=sft"], ["loss=grpo"]):
            refused("the reward compares with a row's `answer`, which is missing or unusable (", *own, *more)
        model = next(option for option in own if option.startswith("model.path="))
        done = run(
            "eval.py", model, "data=files", f"data.path={bare}", "held_out=false", f"annotation_cache={tmp_path}/store"
        )
        assert done.returncode == 1
        assert "row r0: no answer" in done.stderr
        done = run("sample.py", *own, f"out={tmp_path}/rows.jsonl")
        assert done.returncode == 1
        assert "row r0: no answer" in done.stderr
        assert not list((tmp_path / "store").glob("responses/*/*.parquet"))
        assert run("train.py", *own, "loss=sft", "reward=score").returncode == 0

    def test_a_shard_cut_by_hand_is_repaired(self, own: list[str], tmp_path: Path) -> None:
        assert run("annotate.py", *own, "loss=dpo").returncode == 0
        (shard,) = (tmp_path / "store" / "reference_logps").glob("*/*.parquet")
        shard.write_bytes(shard.read_bytes()[:-20])
        done = run("train.py", *own, "loss=dpo")
        assert done.returncode == 0, done.stderr
        assert "the checksum of" in done.stdout
        assert shard.with_suffix(".damaged").exists()

    def test_a_folder_that_cannot_be_written(self, own: list[str], tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        refused("folders that cannot be written", *own, f"annotation_cache={tmp_path}/file/store")

    def test_no_key_for_wandb(self, own: list[str]) -> None:
        refused("no WANDB_API_KEY", *own, "logger=wandb", "logger.wandb.offline=false", WANDB_API_KEY="")

    def test_no_network_for_a_hub_set(self, base: list[str]) -> None:
        refused("cannot be loaded from the hub", *base, "data=offsetbias", "reward=exact_number", HF_HUB_OFFLINE="1")

    def test_no_checkpoint_at_resume(self, own: list[str]) -> None:
        refused("there is no such checkpoint", *own, "resume=/nowhere.ckpt")


def test_the_default_model_takes_a_step(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2-135M end to end: it samples, is rewarded, trained a step by VAR, evaluated and exported."""
    done = run(
        "train.py", "debug=step", "loss=var_grouped", "loss.estimator.drop_zero_variance=false", "data.limit=8",
        "data.validation_prompts=2", "generate.max_new_tokens=16", "generate.responses=2", "data.micro_batch=4",
        "data.global_batch=4", "eval.sampling.responses=2", "loss.temperature_unit=reward",
        f"annotation_cache={tmp_path}/store", f"runs={tmp_path}/runs", "logger=tensorboard",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = only(tmp_path / "runs")
    assert json.loads((folder / "summary.json").read_text())["steps"] == 1
    assert (folder / "model" / "model.safetensors").stat().st_size > 5e8
    assert list((folder / "tensorboard").glob("events.*"))


@pytest.mark.parametrize("loss", ["sft", "var", "var_prompt", "dpo"])
def test_real_dialogues_train(loss: str, base: list[str], real_data: Path, tmp_path: Path) -> None:
    """HHA with the reward model's scores that the data carries, through chat template, plan, store and loss."""
    done = run(
        "train.py", *base, "experiment=hha", f"data.folder={real_data}", f"loss={loss}", "data.limit=40",
        "trainer.max_steps=2", "data.validation_prompts=2", "data.max_length=600", "generate.max_new_tokens=4",
        "eval.sampling.max_new_tokens=4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "sequences dropped" in done.stdout  # byte tokens are many, and what is over the limit is counted
    facts = json.loads((only(tmp_path / "runs") / "summary.json").read_text())["data"]
    assert facts["rows"] == 2274  # 2,354 less the 76 bad ones and the 4 with an empty answer
