"""Every loss through the commands on a tiny random model, runs that start from earlier runs, and rejected settings."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from notebooks.tiny import byte_tokenizer
from tests.helpers.cli import check_error, check_run, read_summary, write_rows, write_to
from tests.helpers.models import pretrained
from tests.helpers.runs import ROOT, column, curve, exported, run_folder
from var.annotate import responses, rewards
from var.annotate.advantages import ProvideAdvantages
from var.data.chat import Chat
from var.models.packing import whole
from var.rewards.classifier import Classifier
from var.sampling.base import Sample
from var.training.datamodule import AlignmentData
from var.training.validation import PairAccuracy

LOSSES = sorted(file.stem for file in (ROOT / "conf" / "loss").glob("[!_]*.yaml") if file.stem != "custom")
pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of 12 prompts with three responses each, the last of them truncated."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", prompts=12, responses=3, seed=2, before="")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the caches of this module, so that tests read what others sampled and scored."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def base(rows: Path, shared: Path, tiny_folder: Path, tmp_path: Path) -> list[str]:
    """Return the overrides of a run without its loss."""
    return [
        f"model.path={tiny_folder}", *write_to(shared), f"runs={tmp_path}/runs",
        "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "trainer.max_steps=2", "data.validation_prompts=0",
        "data.micro_batch=2", "data.global_batch=4", "eval.sampling.responses=1", "eval.sampling.max_new_tokens=2",
        "data=files", f"data.path={rows}", "reward=exact_number", "reward._target_=tests.helpers.rewards.Distinct",
        "generate.responses=3", "generate.max_new_tokens=6", "optim.optimizer.lr=1e-2", "optim.schedule.warmup=0",
    ]  # fmt: skip


@pytest.fixture
def unrewarded(base: list[str]) -> list[str]:
    """Return the overrides without those of the reward."""
    return [option for option in base if not option.startswith("reward")]


def choose(loss: str) -> list[str]:
    """Return the overrides that choose a loss for so little data."""
    more = ["loss.value.development_prompts=2", "loss.value.epochs=2"]
    return [f"loss={loss}", *(more if loss.startswith("alol") else [])]


def train(base: list[str], *overrides: str, runs: Path) -> Path:
    """Train and return the folder of the run."""
    check_run("train.py", *base, *overrides, f"runs={runs}")
    return run_folder(runs)


def logged(folder: Path, name: str) -> list[float]:
    """Return the values of a metric."""
    return column(curve(folder), name)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(loss: str, base: list[str], tiny_folder: Path, tmp_path: Path) -> None:
    """Two steps of two micro-batches give finite metrics and change the weights."""
    folder = train(base, *choose(loss), runs=tmp_path / "runs")
    assert read_summary(folder)["steps"] == 2
    for name in ("train/loss", "train/grad_norm"):
        values = logged(folder, name)
        assert len(values) == 2, name
        assert all(map(math.isfinite, values)), name
    assert max(logged(folder, "train/grad_norm")) > 0
    before, after = load_file(tiny_folder / "model.safetensors"), exported(tmp_path / "runs")
    if loss == "bradley_terry":
        assert after["score.weight"].abs().max() > 0
    else:
        assert max(float((after[name] - before[name]).abs().max()) for name in before) > 1e-4


# Reward models


def test_exported_reward_model_is_a_reward(
    base: list[str], unrewarded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """reward=classifier on the exported folder gives the scores of the trained model, and rewards the next run.

    Before training, all pairs are ties.
    """
    seen: list[tuple[list[list[int]], list[float]]] = []
    on_train_end = PairAccuracy.on_train_end

    def record_scores(self: Any, trainer: Any, module: Any) -> None:
        data = trainer.datamodule
        sequences, plan = data.training_set.sequences, data.training_set.plan
        ids = [data.annotator.chat.complete(sequences.tokens(i)[0]) for i in range(len(sequences))]
        batch = data.batch(next(iter(plan.batches(0, 0, 1))))
        assert all(batch.input_ids[s.start : s.stop].tolist() in ids for s in batch.segments)
        with torch.no_grad():
            seen.append((ids, module.policy(whole(ids)).tolist()))
        on_train_end(self, trainer, module)

    monkeypatch.setattr(PairAccuracy, "on_train_end", record_scores)
    folder = train(base, "loss=bradley_terry", "data.validation_prompts=3", runs=tmp_path / "rm")
    accuracy = read_summary(folder)["validation"]["accuracy"]
    assert accuracy["before"]["mean"] == 0.5
    assert 0 <= accuracy["after"]["mean"] <= 1
    assert logged(folder, "train/loss")[0] == pytest.approx(math.log(2), abs=1e-6)

    classifier = Classifier(path=str(folder / "model"), cache=str(tmp_path / "cache"), device="cpu")
    tokenizer, ((ids, scores),) = byte_tokenizer(), seen
    for row, score in zip(ids, scores, strict=True):
        prompt, response = tokenizer.decode(row[2:-1]).split("<end><assistant>")
        prompt = [{"role": "user", "content": prompt}]
        assert classifier.encode(prompt, response) == row
        assert classifier([prompt], [response], [None]) == pytest.approx([score], abs=1e-6)
    assert np.std(scores) > 1e-3
    online = train(
        unrewarded, "reward=classifier", f"reward.path={folder}/model", "loss=grpo", runs=tmp_path / "online"
    )
    assert read_summary(online)["ran"]["reward_weights"] == str(folder / "model")


@pytest.mark.parametrize("model", ["bytes", "smollm2"])
def test_completed_row_equals_the_encoding_of_the_classifier(
    model: str, tiny_folder: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The tokens are equal, whether the response is finished or lacks its end token."""
    folder = tiny_folder if model == "bytes" else request.getfixturevalue("smollm2")
    chat: Chat = pretrained(folder, tmp_path).chat
    classifier = Classifier(path=str(folder), cache=str(tmp_path), device="cpu")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]
    for prompt in (messages[1:], messages):
        for text in ("It is 4.", "4", "two\n\nlines\n"):
            ids = chat.encode(prompt, text).ids
            assert chat.complete(ids) == classifier.encode(prompt, text)
            assert chat.complete(ids[:-1]) == chat.complete(ids)
    assert bool(chat.tail) == (model == "smollm2")


# Runs that start from an earlier run


def test_run_starts_from_a_run(base: list[str], tmp_path: Path) -> None:
    """Policy and reference are the model of the earlier run, not the base model.

    So the first loss of DPO is log 2, and the first KL of GRPO is 0. A learning rate of 0 leaves the weights unchanged.
    """
    first = train(base, "loss=sft", runs=tmp_path / "first")
    init = f"init={first}"
    dpo = train(base, "loss=dpo", init, runs=tmp_path / "dpo")
    assert logged(dpo, "train/loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    grpo = train(base, "loss=grpo", init, "optim.optimizer.lr=0", runs=tmp_path / "grpo")
    assert max(logged(grpo, "train/kl")) < 1e-9
    before, after = exported(tmp_path / "first"), exported(tmp_path / "grpo")
    assert all(torch.equal(before[name], after[name]) for name in before)
    hashes = [read_summary(folder)["hashes"]["weights"] for folder in (first, dpo, grpo)]
    assert hashes[0] != hashes[1] == hashes[2]
    assert f"Made from {first}" in (grpo / "model" / "README.md").read_text()
    train(base, "loss=sft", f"init={first}/model", runs=tmp_path / "folder")


def validation_prompts(folder: Path) -> set[str]:
    """Return the validation prompts of a run, as JSON."""
    return {json.dumps(json.loads(line)["prompt"]) for line in (folder / "samples.jsonl").read_text().splitlines()}


def test_second_round_trains_on_samples_of_the_first(
    base: list[str], unrewarded: list[str], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sample.py answers all prompts with the model of a run and skips empty responses. data=files reads its rows.

    The second round has the same validation prompts.
    """
    sample_responses, counts = responses.sample_responses, list[int]()

    def sample_an_empty_one(*arguments: Any) -> Any:
        samples = sample_responses(*arguments)
        samples = [[Sample(" ", True), *samples[0][1:]], *samples[1:]]
        counts[:] = [sum(bool(sample.text.strip()) for sample in several) for several in samples]
        return samples

    validation = "data.validation_prompts=3"
    more = [validation, "generate.max_new_tokens=40"]  # long enough for some responses of a random model to end
    first = train(base, *more, "loss=var_grouped", "data.responses=sampled", runs=tmp_path / "first")
    out = tmp_path / "rounds" / "rows.jsonl"
    with monkeypatch.context() as patched:
        for module in (responses, rewards):
            patched.setattr(module, "sample_responses", sample_an_empty_one)
        printed = check_run("sample.py", *base, *more, f"init={first}", f"out={out}")
    records, given = ([json.loads(line) for line in file.read_text().splitlines()] for file in (out, rows))
    assert [record["id"] for record in records] == [row["id"] for row in given]
    own = {response["text"] for row in given for response in row["responses"]}
    assert [len(record["responses"]) for record in records] == counts  # a random model writes empty ones, too
    assert (counts[0], max(counts)) == (2, 3)
    for record in records:
        for response in record["responses"]:
            text = response["text"]
            assert response["score"] == len(set(text)) / max(8, len(text))
            assert response["source"] == str(first)
            assert text not in own
        assert record["sampling"]["sampling"]["responses"] == 3
        assert record["sampling"]["reference"]["weights"]
    assert f"{sum(counts)} responses to 12 prompts in {out}" in printed
    assert [path.name for path in out.parent.iterdir()] == ["rows.jsonl"]

    more += ["loss=dpo", f"init={first}", f"data.path={out}", "reward=score"]
    second = train(unrewarded, *more, runs=tmp_path / "second")
    assert validation_prompts(second) == validation_prompts(first)
    assert len(validation_prompts(first)) == 3


def test_sample_overwrites_only_its_own_files(base: list[str], rows: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_bytes(rows.read_bytes())
    more = ["data=files", f"data.path={data}", "reward=score"]
    check_error(f"out={data} is the data that is read", *base, *more, f"out={data}", command="sample.py")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    words = "exists, and sample.py did not write it. Choose another file, or remove it."
    check_error(words, *base, *more, f"out={tmp_path}/config.json", command="sample.py")
    assert data.read_bytes() == rows.read_bytes()


def test_invalid_init_and_out_are_rejected(base: list[str], tmp_path: Path) -> None:
    message = f"init={tmp_path} is neither a finished run (its folder has no model/) nor the folder of a model"
    check_error(message, *base, f"init={tmp_path}")
    out, folder = f"out={tmp_path}/rows.jsonl", f"out={tmp_path}"
    check_error(message, *base, f"init={tmp_path}", out, command="sample.py")
    assert not (tmp_path / "rows.jsonl").exists()
    check_error("Error: out: a file must be given: out=rows.jsonl", *base, command="sample.py")
    check_error(f"Error: {folder} is a folder. Name a file in it: {out}", *base, folder, command="sample.py")
    (tmp_path / "file").touch()
    message = f"folders that cannot be written (1):\n  {folder}/file: File exists"
    check_error(message, *base, f"{folder}/file/rows.jsonl", command="sample.py")


@pytest.mark.parametrize(("loss", "kind"), [("sft", "all"), ("dpo", "both")])
def test_sampled_responses_replace_those_of_the_data(loss: str, kind: str, base: list[str], tmp_path: Path) -> None:
    folder = train(base, f"loss={loss}", "data.responses=sampled", runs=tmp_path / "runs")
    report = read_summary(folder)["data"]
    assert report["rows_with_unused_responses"] == 12
    assert report["sampled_responses"] == 36
    assert report["responses"] == kind


def test_advantages_select_what_trains(base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`priority` draws only responses with a positive advantage, some of them repeatedly; `all` draws the others, too.

    Development prompts are neither training nor validation prompts.
    """
    prepared: list[AlignmentData] = []
    prepare = AlignmentData.prepare

    def record(self: AlignmentData) -> None:
        prepare(self)
        prepared.append(self)

    monkeypatch.setattr(AlignmentData, "prepare", record)
    folder = train(base, *choose("alol"), "data.validation_prompts=3", runs=tmp_path / "alol")
    data = prepared[-1].training_set
    parts = (data.development, data.validation, data.rows)
    develop, validation, training = ({row.id for row in part} for part in parts)
    assert (len(develop), len(validation), len(training)) == (2, 3, 7)
    assert len(develop | validation | training) == 12
    report = read_summary(folder)["data"]
    assert report["development_prompts"] == 2
    (provider,) = (p for p in prepared[-1].providers if isinstance(p, ProvideAdvantages))
    advantages, drawn = provider.advantages, data.members[data.members >= 0]
    positive = advantages > 0
    assert 0 < float(positive.double().mean()) < 1
    assert report["advantages"]["positive"] == pytest.approx(float(positive.double().mean()))
    assert report["advantages"]["drawn"] == int(positive.sum())
    assert report["advantages"]["distinct"] < report["advantages"]["drawn"]
    assert positive[drawn].all()
    assert logged(folder, "train/advantage/positive") == [1.0, 1.0]
    everything = train(base, *choose("alol_ref_free"), "loss.draw=all", runs=tmp_path / "all")
    assert 0 < np.mean(logged(everything, "train/advantage/positive")) < 1


# Budgets and rejected settings


@pytest.mark.parametrize("accumulate", [1, 2])
def test_budget_stops_after_a_complete_step(accumulate: int, base: list[str], tmp_path: Path) -> None:
    """A budget of 0 seconds allows one step, and a budget of an hour allows all."""
    more = ["loss=sft", f"data.global_batch={2 * accumulate}"]
    stopped = train(base, *more, "trainer.max_seconds=0.0", runs=tmp_path / "stopped")
    complete = train(base, *more, "trainer.max_seconds=3600", runs=tmp_path / "complete")
    assert [read_summary(folder)["steps"] for folder in (stopped, complete)] == [1, 2]
    assert logged(complete, "train/loss")[0] == logged(stopped, "train/loss")[0]


@pytest.mark.parametrize(
    ("message", "overrides"),
    [
        ("generate: temperature and top_p must be 1", ["loss=grpo", "generate.temperature=0.7"]),
        ("generate: temperature and top_p must be 1", ["loss=ppo", "generate.top_p=0.9"]),
        ("reference=live: has no effect", ["loss=grpo", "reference=live"]),
        ("complete steps: set data.last_step=drop", ["loss=grpo", "loss.rollout.passes=2", "data.limit=10"]),
        ("there is nothing to compare", ["loss=grpo", "generate.responses=1"]),
        ("the candidates would be the data's own responses", ["loss=var_sampled", "loss.estimator.seed=0"]),
        ("Set data.micro_batch to 2 or more", ["loss=kto", "data.micro_batch=1"]),
        ("this loss compares two responses of a row", ["loss=kto", "data.responses=all"]),
        (
            "data.validation_prompts=3 and the 9 development prompts that the loss requires would leave none of",
            ["loss=alol", "data.validation_prompts=3", "loss.value.development_prompts=9"],
        ),
    ],
)  # fmt: skip
def test_settings_without_effect_are_rejected(message: str, overrides: list[str], base: list[str]) -> None:
    check_error(message, *base, *overrides)


def test_online_loss_rejects_scores_of_the_data(unrewarded: list[str]) -> None:
    check_error("reward=score: reads only the data's own scores", *unrewarded, "loss=grpo", "reward=score")
