"""Every objective through the commands on a tiny random model, what starts from what, and what is refused."""

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from notebooks.tiny import byte_tokenizer
from tests.e2e.test_commands import only, refused, run
from tests.helpers.models import pretrained
from tests.helpers.runs import ROOT
from var.data.chat import Chat
from var.models.packing import whole
from var.rewards.classifier import Classifier
from var.training.validation import PairAccuracy

LOSSES = sorted(file.stem for file in (ROOT / "conf" / "loss").glob("[!_]*.yaml") if file.stem != "custom")
pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 prompts with three weighted answers each, the last of them cut."""
    draw = random.Random(2)
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with path.open("w") as file:
        for i in range(12):
            texts = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) + str(k) for k in range(3)]
            responses = [{"text": t, "weight": draw.uniform(0.5, 1.5), "finished": t[-1] != "2"} for t in texts]
            file.write(json.dumps({"id": f"r{i}", "prompt": f"{i}?", "responses": responses}) + "\n")
    return path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store and a cache for the module: what one test samples and scores, the next one reads."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def base(rows: Path, shared: Path, tiny_folder: Path, tmp_path: Path) -> list[str]:
    return [
        f"model.path={tiny_folder}",
        f"annotation_cache={shared}/store", f"cache={shared}/cache", f"runs={tmp_path}/runs",
        "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "trainer.max_steps=2", "data.validation_prompts=0",
        "data.micro_batch=2", "data.global_batch=4", "eval.sampling.responses=1", "eval.sampling.max_new_tokens=2",
        "data=files", f"data.path={rows}", "reward=exact_number", "reward._target_=tests.e2e.killing.Distinct",
        "generate.responses=3", "generate.max_new_tokens=6", "optim.optimizer.lr=1e-2", "optim.schedule.warmup=0",
    ]  # fmt: skip


def extra(loss: str) -> list[str]:
    """What a loss needs beside its own file on so little data."""
    more = ["loss.value.development_prompts=2", "loss.value.epochs=2"]
    return [f"loss={loss}", *(more if loss.startswith("alol") else [])]


def curve(folder: Path, name: str) -> list[float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def trained(base: list[str], *overrides: str, runs: Path) -> Path:
    """The folder of a run that trained."""
    done = run("train.py", *base, *overrides, f"runs={runs}")
    assert done.returncode == 0, done.stdout + done.stderr
    return only(runs)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_objective_trains(loss: str, base: list[str], tiny_folder: Path, tmp_path: Path) -> None:
    """Two steps of two micro-batches: finite numbers, weights that moved, a summary and a model."""
    folder = trained(base, *extra(loss), runs=tmp_path / "runs")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2
    for name in ("train/loss", "train/grad_norm"):
        values = curve(folder, name)
        assert len(values) == 2, name
        assert all(map(math.isfinite, values)), name
    assert max(curve(folder, "train/grad_norm")) > 0
    before, after = load_file(tiny_folder / "model.safetensors"), weights(folder)
    if loss == "bradley_terry":
        assert after["score.weight"].abs().max() > 0
    else:
        assert max(float((after[name] - before[name]).abs().max()) for name in before) > 1e-4


# --- reward models


def test_a_trained_reward_model_scores_as_a_reward_what_it_scored(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before training every pair is a tie. The exported folder, read by reward=classifier, gives the trained scorer's
    very numbers, and rewards the next run."""
    seen: list[tuple[list[list[int]], list[float]]] = []

    def measured(self: Any, trainer: Any, module: Any) -> None:
        data = trainer.datamodule
        ids = [data.annotator.chat.complete(data.sequences.tokens(i)[0]) for i in range(len(data.sequences))]
        batch = data.batch(next(iter(data.plan.batches(0, 0, 1))))
        assert all(batch.input_ids[s.start : s.stop].tolist() in ids for s in batch.segments)
        with torch.no_grad():
            seen.append((ids, module.policy(whole(ids)).tolist()))
        real(self, trainer, module)

    real = PairAccuracy.on_train_end
    monkeypatch.setattr(PairAccuracy, "on_train_end", measured)
    folder = trained(base, "loss=bradley_terry", "data.validation_prompts=3", runs=tmp_path / "rm")
    accuracy = json.loads((folder / "summary.json").read_text())["validation"]["accuracy"]
    assert accuracy["before"]["mean"] == 0.5
    assert 0 <= accuracy["after"]["mean"] <= 1
    assert curve(folder, "train/loss")[0] == pytest.approx(math.log(2), abs=1e-6)

    classifier = Classifier(path=str(folder / "model"), cache=str(tmp_path / "cache"), device="cpu")
    tokenizer, ((ids, scores),) = byte_tokenizer(), seen
    for row, score in zip(ids, scores, strict=True):
        prompt, response = tokenizer.decode(row[2:-1]).split("<end><assistant>")
        prompt = [{"role": "user", "content": prompt}]
        assert classifier.encode(prompt, response) == row
        assert classifier([prompt], [response], [None]) == pytest.approx([score], abs=1e-6)
    assert np.std(scores) > 1e-3

    reward = ["reward=classifier", f"reward.path={folder}/model"]
    base = [option for option in base if not option.startswith("reward")]
    trained(base, *reward, "loss=grpo", runs=tmp_path / "online")


@pytest.mark.parametrize("which", ["bytes", "smollm2"])
def test_a_closed_row_is_what_the_classifier_renders(
    which: str, tiny_folder: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Token by token, whether the response was finished or cut before its end token."""
    folder = tiny_folder if which == "bytes" else request.getfixturevalue("smollm2")
    chat: Chat = pretrained(folder, tmp_path).chat
    classifier = Classifier(path=str(folder), cache=str(tmp_path), device="cpu")
    several = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]
    for prompt in (several[1:], several):
        for text in ("It is 4.", "4", "two\n\nlines\n"):
            ids = chat.encode(prompt, text).ids
            assert chat.complete(ids) == classifier.encode(prompt, text)
            assert chat.complete(ids[:-1]) == chat.complete(ids)
    assert bool(chat.tail) == (which == "smollm2")


# --- a run from a run


def test_a_run_starts_from_a_run(base: list[str], tmp_path: Path) -> None:
    """Policy and reference are the earlier run's model: DPO's first loss is log 2, GRPO's first KL is 0, and with a
    learning rate of 0 the weights that come out are those that went in. They are not the base model's."""
    first = trained(base, "loss=sft", runs=tmp_path / "first")
    init, still = f"init={first}", "optim.optimizer.lr=0"
    dpo = trained(base, "loss=dpo", init, runs=tmp_path / "dpo")
    assert curve(dpo, "train/loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    grpo = trained(base, "loss=grpo", init, still, runs=tmp_path / "grpo")
    assert max(curve(grpo, "train/kl")) < 1e-9
    one, two = weights(first), weights(grpo)
    assert all(torch.equal(one[name], two[name]) for name in one)
    hashes = [json.loads((folder / "summary.json").read_text())["hashes"] for folder in (first, dpo, grpo)]
    assert hashes[0]["weights"] != hashes[1]["weights"] == hashes[2]["weights"]
    assert f"base_model: {first}" in (grpo / "model" / "README.md").read_text()
    trained(base, "loss=sft", f"init={first}/model", runs=tmp_path / "folder")


def test_a_wrong_start_is_one_error(base: list[str], tmp_path: Path) -> None:
    refused(f"init={tmp_path} is neither a finished run (its folder has no model/) nor the folder of a model", *base,
            f"init={tmp_path}")  # fmt: skip


def held_out(folder: Path) -> set[str]:
    return {json.dumps(json.loads(line)["prompt"]) for line in (folder / "samples.jsonl").read_text().splitlines()}


def test_rounds(base: list[str], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sample.py answers all prompts by an earlier run's model, empty answers left out; data=files reads its rows, holds
    out the same prompts, and a second round trains on them from there."""
    from var.annotate.annotator import Annotator

    real, drawn = Annotator.sampled, list[list[int]]()

    def with_an_empty_one(self: Annotator, *arguments: Any) -> Any:
        texts = real(self, *arguments)
        texts = [[(" ", True), *texts[0][1:]], *texts[1:]]
        drawn.append([sum(bool(text.strip()) for text, _ in several) for several in texts])
        return texts

    held = "data.validation_prompts=3"
    base = [*base, "generate.max_new_tokens=40"]  # so that some of a random model's answers end
    first = trained(base, "loss=var_grouped", held, "data.responses=sampled", runs=tmp_path / "first")
    out = tmp_path / "rounds" / "rows.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(Annotator, "sampled", with_an_empty_one)
        done = run("sample.py", *base, held, f"init={first}", f"out={out}")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    given = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [record["id"] for record in records] == [row["id"] for row in given]
    own = {response["text"] for row in given for response in row["responses"]}
    assert [len(record["responses"]) for record in records] == drawn[0]  # a random model's are empty now and then
    assert (drawn[0][0], max(drawn[0])) == (2, 3)
    for record in records:
        for response in record["responses"]:
            text = response["text"]
            assert response["score"] == len(set(text)) / max(8, len(text))
            assert response["source"] == str(first)
            assert text not in own
        drawn = record["sampling"]
        assert drawn["sampling"]["responses"] == 3
        assert drawn["reference"]["weights"]
    assert f"{sum(len(record['responses']) for record in records)} responses to 12 prompts in {out}" in done.stdout
    assert [path.name for path in out.parent.iterdir()] == ["rows.jsonl"]

    more = ["loss=dpo", held, f"init={first}", f"data.path={out}", "reward=score"]
    base = [option for option in base if not option.startswith("reward")]
    second = trained(base, *more, runs=tmp_path / "second")
    assert held_out(second) == held_out(first)
    assert len(held_out(first)) == 3


def test_sampling_refuses_what_a_run_refuses(base: list[str], tmp_path: Path) -> None:
    done = run("sample.py", *base, f"init={tmp_path}", f"out={tmp_path}/rows.jsonl")
    assert done.returncode == 1
    assert "is neither a finished run" in done.stderr
    assert not (tmp_path / "rows.jsonl").exists()
    done = run("sample.py", *base)
    assert done.returncode == 1
    assert "Error: out must be given: out=rows.jsonl" in done.stderr
    done = run("sample.py", *base, f"out={tmp_path}")
    assert done.returncode == 1
    assert f"Error: out={tmp_path} is a folder; name a file in it: out={tmp_path}/rows.jsonl" in done.stderr
    (tmp_path / "file").touch()
    done = run("sample.py", *base, f"out={tmp_path}/file/rows.jsonl")
    assert done.returncode == 1
    assert f"folders that cannot be written (1):\n  out={tmp_path}/file: File exists" in done.stderr


def test_sampled_responses_stand_in_for_the_datas_own(base: list[str], tmp_path: Path) -> None:
    """Pairs too are made of them."""
    for loss, kind in (("sft", "all"), ("dpo", "both")):
        folder = trained(base, f"loss={loss}", "data.responses=sampled", runs=tmp_path / loss)
        facts = json.loads((folder / "summary.json").read_text())["data"]
        assert facts["rows whose own responses are not used"] == 12
        assert facts["sampled responses"] == 36
        assert facts["responses"] == kind


# --- A-LoL


def test_advantages(base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Development prompts neither train nor are held out; `priority` draws rows above V(x) alone, some of them twice;
    `all` draws the others too."""
    from var.training.datamodule import AlignmentData

    prepared: list[AlignmentData] = []
    real = AlignmentData.prepare

    def noted(self: AlignmentData) -> None:
        real(self)
        prepared.append(self)

    monkeypatch.setattr(AlignmentData, "prepare", noted)
    folder = trained(base, *extra("alol"), "data.validation_prompts=3", runs=tmp_path / "alol")
    data = prepared[-1]
    develop, held, train = ({row.id for row in part} for part in (data.development, data.validation, data.rows))
    assert (len(develop), len(held), len(train)) == (2, 3, 7)
    assert len(develop | held | train) == 12
    facts = json.loads((folder / "summary.json").read_text())["data"]
    assert facts["prompts set apart for the value estimate"] == 2
    advantages, drawn = data._columns["advantages"], data.members[data.members >= 0]
    assert 0 < float((advantages > 0).double().mean()) < 1
    assert facts["advantages"]["positive"] == pytest.approx(float((advantages > 0).double().mean()))
    assert facts["advantages"]["drawn"] == int((advantages > 0).sum())
    assert facts["advantages"]["distinct"] < facts["advantages"]["drawn"]
    assert (advantages[drawn] > 0).all()
    assert curve(folder, "train/advantage/positive") == [1.0, 1.0]
    everything = trained(base, *extra("alol_ref_free"), "loss.draw=all", runs=tmp_path / "all")
    assert 0 < np.mean(curve(everything, "train/advantage/positive")) < 1
    refused("data.validation_prompts=3 and loss.value.development_prompts=9 holds out all of the 12 distinct prompts",
            *base, *extra("alol"), "data.validation_prompts=3", "loss.value.development_prompts=9")  # fmt: skip


# --- budgets and refusals


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_budget_stops_after_the_first_step(accumulate: int, base: list[str], tmp_path: Path) -> None:
    """Of no second: one whole step all the same; of an hour: all of them."""
    more = ["loss=sft", f"data.global_batch={2 * accumulate}", "trainer.max_seconds=0.0"]
    stopped = trained(base, *more, runs=tmp_path / "stopped")
    assert json.loads((stopped / "summary.json").read_text())["steps"] == 1
    whole = trained(base, *more, "trainer.max_seconds=3600", runs=tmp_path / "whole")
    assert json.loads((whole / "summary.json").read_text())["steps"] == 2
    assert curve(whole, "train/loss")[0] == curve(stopped, "train/loss")[0]


def test_an_online_loss_refuses_what_it_cannot_use(base: list[str]) -> None:
    tempered = "generate.temperature and generate.top_p are 1"
    refused(tempered, *base, "loss=grpo", "generate.temperature=0.7")
    refused(tempered, *base, "loss=ppo", "generate.top_p=0.9")
    refused("reference=live does nothing here", *base, "loss=grpo", "reference=live")
    refused("every step must be whole: set data.last_step=drop", *base, "loss=grpo", "loss.rollout.passes=2",
            "data.limit=10")  # fmt: skip
    refused("generate.responses=1 leaves nothing to compare", *base, "loss=grpo", "generate.responses=1")
    base = [option for option in base if not option.startswith("reward")]
    refused("an online loss rewards new text, and reward=score reads only the data's own", *base, "loss=grpo",
            "reward=score")  # fmt: skip


def test_offline_losses_refuse_what_they_cannot_use(base: list[str]) -> None:
    refused("the candidates would be the data's own answers", *base, "loss=var_sampled", "loss.estimator.seed=0")
    refused("data.micro_batch is ≥ 2", *base, "loss=kto", "data.micro_batch=1")
    refused("this loss compares pairs, and data.responses=all makes none", *base, "loss=kto", "data.responses=all")
