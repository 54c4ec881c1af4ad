"""The commands on a tiny random model, as a user runs them: what they print, write and reject."""

import json
import re
import shutil
from datetime import date
from pathlib import Path

import pytest

from notebooks.tiny import TEMPLATE, byte_tokenizer
from tests.helpers.cli import check_error, check_run, read_summaries, read_summary, spawn, write_rows, write_to
from tests.helpers.models import DATED, saved, set_clock, tiny_config, tiny_model
from tests.helpers.rewards import OWN_REWARD
from tests.helpers.runs import ROOT, run_folder, write_lines
from var.report.read import find_records
from var.report.write import plot

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of 10 prompts with two responses each."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", prompts=10)


@pytest.fixture
def base(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """Return the overrides of a run without its data and loss."""
    return [
        f"model.path={tiny_folder}", *write_to(tmp_path), "trainer.accelerator=cpu", "trainer.log_every_n_steps=1",
        "data.validation_prompts=2", "data.micro_batch=4", "data.global_batch=4", "eval.sampling.responses=2",
        "eval.sampling.max_new_tokens=3",
    ]  # fmt: skip


@pytest.fixture
def own(base: list[str], rows: Path) -> list[str]:
    """Return the overrides of a run on the rows of this file."""
    return [*base, "data=files", f"data.path={rows}", "reward=exact_number", "loss=var_grouped"]


def shards(folder: Path, kind: str = "*") -> list[Path]:
    """Return the files of the annotation cache below `folder`."""
    return list((folder / "store" / kind).glob("*/*.arrow"))


def test_run_writes_its_folder(own: list[str], tmp_path: Path) -> None:
    printed, errors = (process := spawn(str(ROOT / "train.py"), *own)).communicate(timeout=300)
    assert process.returncode == 0, printed + errors
    folder = run_folder(tmp_path / "runs")
    for name in (".hydra/config.yaml", "summary.json", "metrics.csv", "samples.jsonl", "plots/curves.png",
                 "model/README.md"):  # fmt: skip
        assert (folder / name).stat().st_size, name
    summary = read_summary(folder)
    for when in ("before", "after", "gain"):
        assert set(summary["validation"]["reward"][when]) == {"mean", "se"}
    assert {"kl", "length", "tokens_per_second", "ess", "hashes", "versions", "seeds", "commit"} <= set(summary)
    for text in ("validation reward", "KL from the reference", "response length", "tokens per second",
                 "effective sample size", "zero-variance groups", str(folder)):  # fmt: skip
        assert text in printed
    sample = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])
    assert {"prompt", "before", "after"} <= set(sample)
    assert "Run already finished" in check_run("train.py", *own)


def test_finished_run_warns_that_its_data_changed(options: list[str], rows: Path, tmp_path: Path) -> None:
    """The folder's name contains the path of the data and not its content."""
    data = tmp_path / "own rows.jsonl"
    data.write_bytes(rows.read_bytes())
    command = ["train.py", *options, f"data.path='{data}'", "trainer.max_steps=1"]
    check_run(*command)
    assert "changed after this run finished" not in check_run(*command)
    data.write_text(data.read_text().replace("question", "request"))
    warning = f"{data} changed after this run finished. Use resume=false to train on the current data."
    assert warning in check_run(*command)


def test_finished_run_warns_that_its_model_changed(options: list[str], tmp_path: Path) -> None:
    """The folder's name contains the path of the model and not its weights."""
    model = saved(tmp_path / "model")
    command = ["train.py", *options, f"model.path={model}", "trainer.max_steps=1"]
    check_run(*command)
    assert "other weights" not in check_run(*command)
    saved(model, tiny_model(seed=1))
    warning = f"model.path={model} has other weights than when this run started. Use resume=false to train from"
    assert warning in check_run(*command)
    shutil.rmtree(model)
    assert "Run already finished" in check_run(*command)


def test_report_reads_a_real_run(own: list[str], tmp_path: Path) -> None:
    check_run("train.py", *own, "loss.min_weight=0.1")
    check_run("report.py", f"{tmp_path}/runs", "--out", f"{tmp_path}/out")
    (record,) = find_records([tmp_path / "runs"]).runs
    assert "loss.min_weight=0.1" in record.overrides
    assert not any(line.startswith(("runs=", "annotation_cache=", "cache=")) for line in record.overrides)
    assert {"reward before", "reward after", "gain, paired", "KL, nats", "ESS/n", "tokens/s"} <= record.measures.keys()
    assert {"train/loss", "train/weight/ess", "validation/reward"} <= record.curves.keys()
    assert len(record.samples) == 2
    assert record.plan["micro"].shape[1] == 4
    assert (tmp_path / "out" / "figures" / "frontier.png").stat().st_size
    (page,) = (tmp_path / "out" / "pages").iterdir()
    assert "exact_number" in page.read_text() or "ExactNumber" in page.read_text()
    plot([record.folder], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size


@pytest.mark.long
def test_later_runs_sample_and_score_nothing(base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another λ, learning rate, estimator or loss reads the annotations of the first run (huggingface/trl #3985)."""
    more = [*base, "data.source.problems=12", "generate.max_new_tokens=4"]
    more += ["reward=exact_number", "reward._target_=own_reward.Distinct"]
    (tmp_path / "own_reward.py").write_text(OWN_REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    check_run("train.py", *more, "loss=var")
    for other in (["loss=var", "loss.temperature=3"], ["loss=var", "optim.optimizer.lr=1e-3"],
                  ["loss=var_grouped"], ["loss=dpo", "data.micro_batch=2", "data.global_batch=2"]):  # fmt: skip
        printed = check_run("train.py", *more, *other)
        for stage in ("Sampling", "Scoring", "Evaluating the reference"):
            assert stage not in printed
    computed = [len(summary["computed"]) for summary in read_summaries(tmp_path / "runs").values()]
    assert sorted(computed) == [0, 0, 0, 1, 6]  # only DPO adds something: the reference on its pairs


def test_annotate_fills_the_cache_for_annotate_error(own: list[str]) -> None:
    check_error("Compute them once with: python annotate.py ", *own, "loss=dpo", "annotate=error")
    assert "Reference log-probabilities" in check_run("annotate.py", *own, "loss=dpo")
    check_run("train.py", *own, "loss=dpo", "annotate=error")


def test_annotate_samples_nothing_for_a_reward_model(own: list[str]) -> None:
    printed = check_run("annotate.py", *own, "loss=bradley_terry", "reward=score")
    assert "Evaluating the reference" not in printed


@pytest.mark.long
def test_ranks_of_annotate_share_the_work(own: list[str], tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "annotate.py"))
    process = spawn(*launcher, *own, "loss=dpo", "trainer.devices=2", "data.global_batch=8")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert len(shards(tmp_path, "reference_logps")) == 2
    assert "All annotations were cached; nothing to do." in check_run("annotate.py", *own, "loss=dpo")


def test_dry_run_shows_what_would_train(own: list[str], tmp_path: Path) -> None:
    printed = check_run("train.py", *own, "loss=dpo", "debug=dry", "reward=score")
    for text in ("ReferenceLogps [N] in nats", "Memory per device", "reference log-probabilities: 0 of 16", "⟦",
                 "<end>⟧"):  # fmt: skip
        assert text in printed, printed
    assert not shards(tmp_path)
    printed = check_run("train.py", *own, "debug=dry", "data.responses=sampled", "data.validation_prompts=0")
    assert "⟦… the response is not available yet …⟧" in printed


@pytest.mark.long
def test_short_presets_train(own: list[str], tmp_path: Path) -> None:
    for preset in ("step", "limit", "overfit", "profile"):
        check_run("train.py", *own, f"debug={preset}", "data.limit=10", "data.validation_prompts=2")
    assert min(summary["steps"] for summary in read_summaries(tmp_path / "runs").values()) == 1


@pytest.mark.long
def test_commands_of_a_run_read_the_date_of_its_first_start(
    own: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """annotate.py starts the run, and train.py resumes it on the next day. A run that only shows leaves no date."""
    folder = saved(tmp_path / "dated", tokenizer=byte_tokenizer(DATED))
    own = [*own, f"model.path={folder}", "loss=sft", "data.responses=sampled", "generate.max_new_tokens=40"]
    monkeypatch.chdir(tmp_path)
    set_clock(monkeypatch, date(2026, 11, 28))
    check_run("train.py", *own, "debug=dry")
    check_run("train.py", *own, "debug=rows")
    check_run("sample.py", *own, f"out={tmp_path}/rows.jsonl")
    assert not list(tmp_path.rglob("date.txt"))
    sampling = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])["sampling"]
    assert sampling["reference"]["template"] == [DATED, {}, "2026-11-28"]
    set_clock(monkeypatch, date(2026, 11, 29))
    check_run("annotate.py", *own)
    assert (run_folder(tmp_path / "runs") / "date.txt").read_text() == "2026-11-29"
    set_clock(monkeypatch, date(2026, 11, 30))
    assert "model.date=2026-11-29." in check_run("train.py", *own, "annotate=error").replace("\n", " ")
    prompts = (run_folder(tmp_path / "runs") / "batches.jsonl").read_text()
    assert prompts.count("<system>29 Nov 2026<end>") == len(prompts.splitlines()) > 0
    config = (run_folder(tmp_path / "runs") / "model" / "config.yaml").read_text()
    assert "\n  date: '2026-11-29'\n" in config  # read by eval.py
    check_error("annotate=error", *own, "annotate=error", "resume=false")


def test_template_that_changes_rows_is_an_error_or_counted(own: list[str], tmp_path: Path) -> None:
    """In the data's responses, and in the prompts that are sampled, before anything is computed."""
    added = TEMPLATE.replace("m['content']", "('<t></t>' if m.role == 'assistant' else '') + m['content']")
    lost = TEMPLATE.replace("m['content']", "(m['content'] | replace('?', '!'))")
    one, two = (saved(tmp_path / str(i), tokenizer=byte_tokenizer(text)) for i, text in enumerate((added, lost)))
    error = check_error("rows that the chat template does not write as they are", *own, f"model.path={one}")
    assert "row r1#0: the response is {+<t></t>+}" in error
    sampled = [*own, f"model.path={two}", "data.responses=sampled"]
    for more in ([], ["loss=grpo"], ["eval=off"]):  # validation prompts first, if there is an evaluation
        error = check_error("rows that the chat template does not write as they are", *sampled, *more)
        rows = len(re.findall(r"row r(\d+): the user's message 0 is \1\[-\?-\]\{\+!\+\}", error))
        assert rows == (8 if "eval=off" in more else 2)
    assert not shards(tmp_path)
    printed = check_run("train.py", *own, f"model.path={one}", "data.on_template_change=count", "loss=sft")
    assert "changes 16 rows, which train as it writes them" in printed.replace("\n", " ")
    (folder,) = read_summaries(tmp_path / "runs")
    record = json.loads((folder / "batches.jsonl").read_text().splitlines()[0])
    assert record["trained"]["tokens"] == f"<t></t>{record['response']}<end>"
    assert record["trained"]["after"].endswith("<end><assistant>")


def test_debug_rows_shows_what_trains(base: list[str], tmp_path: Path) -> None:
    """Long responses are truncated or dropped as in training, which can make the responses of a pair equal."""
    records = [
        {"id": "a", "prompt": "q", "chosen": "abcde", "rejected": "abcdf"},
        {"id": "b", "prompt": "q", "chosen": "x<end>", "rejected": "y"},
    ]
    file = write_lines(tmp_path / "pairs.jsonl", records)
    rows = [*base, "debug=rows", "data=preferences", f"data.path={file}", "reward=score", "loss=dpo"]
    rows = [*rows, "data.max_length=9"]  # 5 tokens of the prompt
    printed = check_run("train.py", *rows, "data.overlong=truncate").replace("\n", " ")
    for text in ("<bos><user>q<end><assistant>⟦abcd⟧ trained tokens: [64, 65, 66, 67]", "truncated from 11 tokens",
                 "row a#0: 5 prompt tokens, which are read, and 4 that train", "⟦x<en⟧", "⟦y<end>⟧",
                 "responses: 4, longer than data.max_length (truncate): 3, trained tokens: 14, with control tokens, "
                 "encoded as text: 1, the same tokens as another response of the row: 1"):  # fmt: skip
        assert text in printed, printed
    printed = check_run("train.py", *rows).replace("\n", " ")
    assert "row a#1: dropped, since it has 11 tokens; data.max_length=9" in printed
    assert "longer than data.max_length (drop): 3, trained tokens: 2," in printed
    error = check_error("row b#0: it has 12 tokens; data.max_length=9", *rows, "data.overlong=error")
    assert "rows that cannot be tokenized (3)" in error
    added = TEMPLATE.replace("m['content']", "('<t></t>' if m.role == 'assistant' else '') + m['content']")
    rows += ["data.max_length=99", f"model.chat_template={added!r}"]
    assert "row b#1: the response is {+<t></t>+}y" in check_error(
        "rows that the chat template does not write as they are: 4; differences", *rows
    )
    printed = check_run("train.py", *rows, "data.on_template_change=count").replace("\n", " ")
    assert "⟦<t></t>y<end>⟧" in printed
    assert "changes 4 rows, which train as it writes them" in printed


def test_debug_rows_checks_prompts_without_responses(base: list[str], tmp_path: Path) -> None:
    """The template changes one of them, and it cannot write another."""
    file = write_lines(tmp_path / "prompts.jsonl", [{"id": text, "prompt": text, "answer": "1"} for text in "a?!"])
    changed = "(raise_exception('loud') if m.content == '!' else m.content | replace('?', '.'))"
    template = TEMPLATE.replace("m['content']", changed)
    (tmp_path / "own.jinja").write_text(template)
    rows = [*base, "debug=rows", "data=prompts", f"data.path={file}", "reward=exact_number"]
    error = check_error("rows that cannot be tokenized (1)", *rows, f"model.chat_template={tmp_path}/own.jinja")
    assert "row !: the chat template cannot render these messages: TemplateError: loud" in error
    (tmp_path / "own.jinja").write_text(template.replace("'!'", "'no'"))
    error = check_error(
        "rows that the chat template does not write as they are: 1; differences (1)",
        *rows,
        f"model.chat_template={tmp_path}/own.jinja",
    )
    assert "row ?: the user's message 0 is [-?-]{+.+}" in error


@pytest.mark.long
def test_each_job_of_a_sweep_has_its_folder(own: list[str], tiny_folder: Path, tmp_path: Path) -> None:
    check_run("train.py", "-m", *own, "loss=sft,var_grouped", "logger=wandb")
    names = [folder.name.rsplit("-", 1)[0] for folder in read_summaries(tmp_path / "runs")]
    assert names == [f"{tiny_folder.name}_files_sft", f"{tiny_folder.name}_files_var_grouped"]
    assert len(list((tmp_path / "runs").glob("*/wandb/offline-run-*"))) == 2  # one W&B run per job (wandb #1314)


def test_help_shows_an_example_and_the_groups() -> None:
    printed = check_run("train.py", "--help")
    for text in ("python train.py loss=sft", "Groups, written group=option:", "smollm2-135m", "var_grouped"):
        assert text in printed


class TestInvalidInput:
    """Each is one clear error before the first expensive step."""

    @pytest.mark.parametrize(
        ("message", "overrides"),
        [
            ("nowhere.jsonl", ["data.path=/nowhere.jsonl"]),
            ("var_grouped", ["loss=vra"]),  # it lists the options of the group
            ("Did you mean loss.temperature?", ["loss.temperatur=1"]),
            ("did you mean temperature?", ["+loss.temperatur=1"]),
            ("micro-batches of data.micro_batch=4, fewer than the 2 processes", ["trainer.devices=2"]),
            ("this loss compares two responses of a row", ["loss=dpo", "data.responses=all"]),
            ("reward.mismatch_gap", ["reward=score", "loss=var"]),
            ("reward=none: only eval.py runs without a reward", ["reward=none"]),
            ("there is no such checkpoint", ["resume=/nowhere.ckpt"]),
            ("folders that cannot be written", ["annotation_cache=/dev/null/store"]),
        ],
    )
    def test_overrides(self, message: str, overrides: list[str], own: list[str]) -> None:
        check_error(message, *own, *overrides)

    def test_environment(self, own: list[str], base: list[str]) -> None:
        message = "model.path=nobody/nothing: not completely on this machine"
        check_error(message, *own, "model.path=nobody/nothing", HF_HUB_OFFLINE="1")
        hub_set = [*base, "data=offsetbias", "reward=exact_number"]
        check_error("data: NCSOFT/offsetbias[train]: not completely on this", *hub_set, HF_HUB_OFFLINE="1")
        check_error("no WANDB_API_KEY", *own, "logger=wandb", "logger.wandb.offline=false", WANDB_API_KEY="")

    def test_all_invalid_rows_are_reported(self, own: list[str], rows: Path, tmp_path: Path) -> None:
        lines = rows.read_text().splitlines()
        lines[2] = lines[2][:-5]
        lines[5] = lines[5].replace('"score"', '"scoer"')
        lines[7] = json.dumps({"id": "nan", "prompt": "?", "responses": [{"text": "a", "score": float("nan")}]})
        lines[8] = json.dumps({"id": "empty", "prompt": "?", "responses": [" "]})
        lines[9] = lines[0]
        bad = tmp_path / "bad.jsonl"
        bad.write_text("\n".join(lines))
        error = check_error("bad.jsonl:3:", *own, f"data.path={bad}")
        for text in (*(f"bad.jsonl:{line}:" for line in (6, 8, 9, 10)), "scoer", "nan", "is empty",
                     "id 'r0' is also the id of"):  # fmt: skip
            assert text in error
        assert not shards(tmp_path)

    def test_reward_that_validation_cannot_use_is_an_error_before_annotation(
        self, base: list[str], tmp_path: Path
    ) -> None:
        """loss=dpo reads no reward, but validation does."""
        pairs = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(12)]
        data = ["data=preferences", f"data.path={write_lines(tmp_path / 'pairs.jsonl', pairs)}", "loss=dpo"]
        error = check_error("the reward compares with a row's `answer`", *base, *data, "reward=exact_number")
        assert "trains without one with eval=off" in error
        assert not shards(tmp_path)

    def test_all_wrong_types_are_reported(self, own: list[str]) -> None:
        values = {"loss.temperature": "hot", "trainer.epochs": "two", "data.overlong": "shrink", "reference": "alive"}
        kinds = ("float", "int", "drop or truncate or error", "cached or live")
        error = check_error("loss.temperature", *own, *(f"{key}={value}" for key, value in values.items()))
        for (key, value), kind in zip(values.items(), kinds, strict=True):
            assert f"{key}: expected {kind}, got '{value}'" in error

    def test_reward_model_without_template(self, own: list[str], tmp_path: Path) -> None:
        from transformers import LlamaForSequenceClassification

        model = LlamaForSequenceClassification(tiny_config(num_labels=1))
        folder = saved(tmp_path / "rm", model, byte_tokenizer(template=None))
        message = "has no chat template, so its scores would be meaningless"
        check_error(message, *own, "reward=classifier", f"reward.path={folder}")

    def test_overlong_rows(self, own: list[str], rows: Path, tmp_path: Path) -> None:
        records = [json.loads(line) for line in rows.read_text().splitlines()]
        records += [{"id": "long", "prompt": "?", "responses": ["x" * 90]},
                    {"id": "full", "prompt": "y" * 90, "responses": ["x"]}]  # fmt: skip
        long = write_lines(tmp_path / "long.jsonl", records)
        more = [*own, f"data.path={long}", "data.max_length=40", "loss=sft", "data.validation_prompts=1"]
        check_error("row long#0: it has", *more, "data.overlong=error")
        check_error("row full#0: its prompt alone has", *more, "data.overlong=truncate")
        printed = check_run("train.py", *more)
        assert "sequences dropped as overlong: 1" in printed
        assert "sequences whose prompt fills the limit: 1" in printed

    def test_rows_without_the_answer_that_the_reward_needs(self, own: list[str], rows: Path, tmp_path: Path) -> None:
        """The error comes before sampling, from training, from validation alone, and from the other commands."""
        (bare := tmp_path / "bare.jsonl").write_text(rows.read_text().replace('"answer": "1", ', ""))
        own = [*own, f"data.path={bare}"]
        for more in (["data.responses=sampled"], ["loss=sft"], ["loss=grpo"]):
            check_error("the reward compares with a row's `answer`, which is missing or unusable (", *own, *more)
        evaluation = [own[0], "data=files", f"data.path={bare}", "held_out=false", f"annotation_cache={tmp_path}/store"]
        check_error("row r0: no answer", *evaluation, command="eval.py")
        check_error("row r0: no answer", *own, f"out={tmp_path}/rows.jsonl", command="sample.py")
        assert not shards(tmp_path, "responses")
        check_run("train.py", *own, "loss=sft", "reward=score")

    def test_damaged_shard_is_repaired(self, own: list[str], tmp_path: Path) -> None:
        check_run("annotate.py", *own, "loss=dpo")
        (shard,) = shards(tmp_path, "reference_logps")
        shard.write_bytes(shard.read_bytes()[:-20])
        assert f"checksum mismatch in {shard}" in check_run("train.py", *own, "loss=dpo")
        assert shard.with_suffix(".damaged").exists()


def test_default_model_takes_a_step(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2-135M end to end: sampled, rewarded, trained for one step of VAR, evaluated and exported."""
    check_run(
        "train.py", "debug=step", "loss=var_grouped", "loss.estimator.drop_zero_variance=false", "data.limit=8",
        "data.validation_prompts=2", "generate.max_new_tokens=16", "generate.responses=2", "data.micro_batch=4",
        "data.global_batch=4", "eval.sampling.responses=2", "loss.temperature_unit=reward",
        f"annotation_cache={tmp_path}/store", f"runs={tmp_path}/runs", "logger=tensorboard",
    )  # fmt: skip
    folder = run_folder(tmp_path / "runs")
    assert read_summary(folder)["steps"] == 1
    assert (folder / "model" / "model.safetensors").stat().st_size > 5e8
    assert list((folder / "tensorboard").glob("events.*"))


@pytest.mark.parametrize(
    "loss", ["var", *(pytest.param(n, marks=pytest.mark.long) for n in ("sft", "var_prompt", "dpo"))]
)
def test_real_dialogues_train(loss: str, base: list[str], real_data: Path, tmp_path: Path) -> None:
    """HHA with the rewards that the data contains, through template, plan, annotation cache and loss."""
    printed = check_run(
        "train.py", *base, "experiment=hha", f"data.folder={real_data}", f"loss={loss}", "data.limit=40",
        "trainer.max_steps=2", "data.validation_prompts=2", "data.max_length=600", "generate.max_new_tokens=4",
        "eval.sampling.max_new_tokens=4",
    )  # fmt: skip
    assert "sequences dropped" in printed  # a byte tokenizer makes long sequences, and dropped ones are counted
    report = read_summary(run_folder(tmp_path / "runs"))["data"]
    assert report["rows"] == 2274  # 2,354 without the 76 bad ones and the 4 with an empty answer
