"""The annotator: nothing is computed twice, nothing stale is read, and missing numbers are reported."""

import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from notebooks.tiny import TEMPLATE, byte_tokenizer
from tests.helpers.annotators import (
    ROWS,
    SAMPLING,
    RowSource,
    make_annotator,
    make_micro,
    make_sequences,
    policy_is_loaded,
)
from tests.helpers.models import pretrained, saved, tiny_model
from var.annotate.annotator import Annotator, MissingAnnotations
from var.annotate.prompt_features import prompt_features
from var.annotate.reference_logps import cached_cross_logps, reference_logps
from var.annotate.responses import add_responses, sample_responses, sampling_fingerprint
from var.annotate.rewards import cross_rewards, score_rows
from var.data.read import read
from var.data.report import DataReport
from var.data.row import Response, Row
from var.models.frozen import FrozenModel
from var.sampling.base import Sample
from var.utils.distributed import Ranks
from var.utils.errors import UserError


def annotate_everything(annotator: Annotator) -> list[Any]:
    """Return log-probabilities, cross log-probabilities, cross rewards, rewards, features and sampled responses."""
    rows, sequences = make_sequences(annotator)
    micro = make_micro(sequences, 4)
    return [
        reference_logps(annotator, sequences).to_pylist(),
        cached_cross_logps(annotator, sequences, micro).tolist(),
        cross_rewards(annotator, rows, sequences, micro).tolist(),
        score_rows(annotator, rows).tolist(),
        prompt_features(annotator, sequences).tolist(),
        list(sample_responses(annotator, rows, SAMPLING)),
    ]


def test_second_run_computes_nothing_and_reads_the_same(make):
    """The first one computes each distinct item once: 8 responses, 6 prompts, and at most 32 pairs."""
    first, second = make(), make(annotate="error")
    assert annotate_everything(first) == annotate_everything(second)
    assert second.computed == {}
    assert not policy_is_loaded(second)
    assert second.reward.asked == []
    counts = dict(first.computed)
    assert counts.pop("Cross log-probabilities") <= 32
    cross, own = counts.pop("Cross scoring"), counts.pop("Scoring", 0)
    assert len(first.reward.asked) == len(set(first.reward.asked)) == cross + own
    assert counts == {"Reference log-probabilities": 8, "Prompt features": 6, "Sampling": 6}


def test_subset_and_another_order_of_rows_are_read_from_the_cache(make):
    one, two = make(), make()
    found = reference_logps(one, make_sequences(one)[1]).to_pylist()
    _, sequences = make_sequences(two, ROWS[::-1][:3])  # rows 5, 4, 3, of which row 4 has two responses
    assert reference_logps(two, sequences).to_pylist() == [found[i] for i in (7, 5, 6, 4)]
    assert two.computed == {}


def test_changed_weight_is_another_reference(tiny_folder, tmp_path):
    """One number of the model is overwritten in its folder. Nothing stale is read, and rewards are still cached."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    before = annotate_everything(make_annotator(folder, tmp_path))
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name].clone()
    weights[name][0, 0] += 3.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    two = make_annotator(folder, tmp_path)
    after = annotate_everything(two)
    assert two.computed == {
        "Reference log-probabilities": 8, "Cross log-probabilities": two.computed["Cross log-probabilities"],
        "Prompt features": 6, "Sampling": 6,
    }  # fmt: skip
    assert [a == b for a, b in zip(before[:5], after[:5], strict=True)] == [False, False, True, True, False]
    assert len(list((tmp_path / "store" / "reference_logps").iterdir())) == 2


@pytest.mark.parametrize("kernel", [{"attention": "varlen"}, {"compile": True}])
def test_kernel_is_part_of_the_fingerprint_in_low_precision(kernel, tiny_folder, tmp_path):
    """In bf16, log-ratios to a reference computed by another kernel would not start at zero."""
    plain = pretrained(tiny_folder, tmp_path / "cache")
    for files, autocast, same in (
        (plain, None, True), (plain, torch.bfloat16, False), (replace(plain, dtype="bfloat16"), None, False),
    ):  # fmt: skip
        one, other = (FrozenModel(some, "cpu", autocast) for some in (files, replace(files, **kernel)))
        assert (one.fingerprint == other.fingerprint) is same


def test_fingerprint_depends_on_autocast_but_not_on_the_name(tiny_folder, tmp_path):
    plain = pretrained(tiny_folder, tmp_path)
    fingerprint = FrozenModel(plain, "cpu").fingerprint
    assert fingerprint.items() >= plain.fingerprint.items()
    assert FrozenModel(plain, "cpu", torch.bfloat16).fingerprint != fingerprint
    assert FrozenModel(replace(plain, name="other", attention="packed"), "cpu").fingerprint == fingerprint


def test_fingerprint_depends_on_the_tokenizer_but_not_its_padding(tiny_folder, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(tiny_folder, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    one, other = (FrozenModel(pretrained(where, tmp_path), "cpu") for where in (tiny_folder, folder))
    assert other.fingerprint == {**one.fingerprint, "tokenizer": other.fingerprint["tokenizer"]}
    assert other.fingerprint["tokenizer"] != one.fingerprint["tokenizer"]
    again = pretrained(tiny_folder, tmp_path)
    again.chat.tokenizer.pad_token = "<end>"
    again.chat.tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert again.fingerprint == one.pretrained.fingerprint


# --- sampled responses


def test_sampled_responses_are_reproducible_and_cached(make, tmp_path):
    """An empty cache gives the same text, since seeds derive from the content. Responses are in the rows' order."""
    one, two, other = (make(root=tmp_path / name) for name in ("a", "a", "b"))
    rows, _ = make_sequences(one)
    texts = list(sample_responses(one, rows, SAMPLING))
    assert [len(several) for several in texts] == [2] * 6
    assert list(sample_responses(two, rows, SAMPLING)) == texts
    assert two.computed == {}
    assert list(sample_responses(other, rows, SAMPLING)) == texts
    assert other.computed == {"Sampling": 6}
    assert list(sample_responses(two, rows, replace(SAMPLING, seed=1))) != texts
    assert two.computed == {"Sampling": 6}
    assert list(sample_responses(two, rows.select([4, 1]), SAMPLING)) == [texts[4], texts[1]]


class Elsewhere:
    """A sampler that records its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def fingerprint(self, reference: FrozenModel) -> dict[str, Any]:
        return {"sampler": "elsewhere"}

    def check(self) -> None:
        self.calls.append("check")

    def __call__(self, reference: Any, prompts: Any, sampling: Any, advance: Any) -> Any:
        self.calls.append(f"sample {len(prompts)}")
        answers = [f"{number}?" for number in range(sampling.responses)]
        return [[Sample(answer, True) for answer in answers] for _ in prompts]

    def release(self) -> None:
        self.calls.append("release")


def test_each_sampler_has_its_own_table_and_is_released(make):
    """A sampler is checked only if responses are missing. Cached ones can be read where it cannot run."""
    one = make(sampler=Elsewhere())
    rows, _ = make_sequences(one)
    texts = list(sample_responses(one, rows, SAMPLING))
    assert texts[0] == [Sample("0?", True), Sample("1?", True)]
    assert one.sampler.calls == ["check", "sample 6", "release"]
    local = list(sample_responses(one.with_local_sampler, rows, SAMPLING))
    assert local == list(sample_responses(make(), rows, SAMPLING)) != texts
    again = make(sampler=Elsewhere())
    assert list(sample_responses(again, rows, SAMPLING)) == texts
    assert again.sampler.calls == ["release"]
    assert sampling_fingerprint(one, SAMPLING) == {
        "sampler": "elsewhere", "end_tokens": [257], "sampling": SAMPLING.fingerprint
    }  # fmt: skip


def test_sampled_responses_become_rows_and_are_counted(make, tmp_path):
    """A sampler that returns text gives the tokens of the text, and is counted."""
    one = make()
    (rows, _), chat = make_sequences(one), one.chat
    n, o = chat.tokenizer("no", add_special_tokens=False)["input_ids"]
    samples = [
        [Sample("yes", True), Sample(" \n", True)], [Sample.of(chat, [n, o]), Sample.of(chat, [n, o, 257])],
        *[[Sample("a", True), Sample("b", True)]] * 4,
    ]  # fmt: skip
    report = DataReport()
    sampled = add_responses(rows, samples, chat, tmp_path, report)
    assert report == DataReport(
        sampled_responses=12, sampled_as_text=9, empty_responses_skipped=1, truncated_responses=1
    )
    ids = (*chat.tokenizer("yes", add_special_tokens=False)["input_ids"], 257)
    assert sampled[0].responses == (Response(text="yes", source="sampled", ids=ids),)
    assert [(r.finished, r.ids) for r in sampled[1].responses] == [(False, (n, o)), (True, (n, o, 257))]
    assert sampled[1].prompt == ROWS[1].prompt
    assert sampled[1].answer == "1"


# --- missing numbers, and several ranks


def test_text_of_a_token_without_embedding_is_an_error(tmp_path):
    """In a prompt, a response or a tool call. The token itself may be in the tokenizer."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    folder = saved(tmp_path / "model", tiny_model(vocab_size=len(tokenizer) - 1), tokenizer)
    annotator = make_annotator(folder, tmp_path)
    call = {"tool_calls": [{"type": "function", "function": {"name": "<tool>", "arguments": {}}}]}
    texts = [("a", "b", {}), ("a <tool>", "b", {}), ("a", "<tool>b", {}), ("a", "", call)]
    rows = tuple(
        Row(id=str(i), prompt=({"role": "user", "content": asked},), responses=(Response(text=text, message=message),))
        for i, (asked, text, message) in enumerate(texts)
    )
    annotator.check_rows(read(RowSource(rows[:1]), annotator.cache))
    with pytest.raises(UserError) as error:
        annotator.check_rows(read(RowSource(rows), annotator.cache))
    lines = str(error.value).splitlines()
    assert lines[0].endswith("rows with tokens for which the model has no embedding (3):")
    assert lines[1:4] == [f"  row {i}: '<tool>', id {len(tokenizer) - 1}" for i in (1, 2, 3)]


def test_prompts_that_the_template_rejects_are_named_before_sampling(tmp_path):
    rejects = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    folder = saved(tmp_path / "model", tokenizer=byte_tokenizer(rejects + TEMPLATE))
    annotator = make_annotator(folder, tmp_path)
    system = {"role": "system", "content": "s"}
    rows = [replace(row, prompt=(system, *row.prompt)) if i % 2 else row for i, row in enumerate(ROWS[:4])]
    with pytest.raises(UserError) as error:
        sample_responses(annotator, read(RowSource(tuple(rows)), annotator.cache), SAMPLING)
    reason = "the chat template cannot render these messages: TemplateError: no system turn"
    lines = str(error.value).splitlines()
    assert lines[1:3] == [f"  row row-1: {reason}", f"  row row-3: {reason}"]
    assert "set model.chat_template" in lines[3]
    assert not policy_is_loaded(annotator)


def test_missing_numbers_are_an_error_with_the_command_that_computes_them(make):
    some = make()
    reference_logps(some, make_sequences(some, ROWS[:2])[1])
    annotator = make(annotate="error", command="python annotate.py loss=dpo data=files")
    with pytest.raises(UserError) as error:
        reference_logps(annotator, make_sequences(annotator)[1])
    assert str(error.value) == (
        "annotate=error: the annotation cache lacks 5 of 8 reference logps. Compute them once with: "
        "python annotate.py loss=dpo data=files"
    )
    assert annotator.computed == {}


def test_dry_run_counts_missing_numbers_and_computes_nothing(make):
    annotator = make(dry=True)
    with pytest.raises(MissingAnnotations, match=r"^Reference log-probabilities: 8 of 8 responses are missing in "):
        reference_logps(annotator, make_sequences(annotator)[1])
    assert annotator.missing == {"Reference log-probabilities": (8, 8)}
    assert annotator.computed == {}


def test_every_rank_reaches_the_barriers_whatever_it_finds_missing(make):
    """Another job may write between the looks of two ranks, so a rank that misses nothing waits as well.

    It waits once before the work and once after it.
    """
    calls: list[int] = []
    for _ in range(2):
        annotator = make(ranks=Ranks(barrier=lambda: calls.append(0)))
        score_rows(annotator, make_sequences(annotator)[0])
    assert len(calls) == 4


def test_incomplete_reward_is_an_error(make):
    """Both missing attributes are named, before anything is loaded."""

    class Incomplete:
        def __call__(self, prompts: Any, responses: Any, answers: Any) -> list[float]:
            return [0.0 for _ in responses]

    with pytest.raises(UserError) as error:
        replace(make(), reward=Incomplete()).check()
    assert "attributes are missing from Incomplete; see docs/rewards.md (2)" in str(error.value)
    assert "`fingerprint`: it says what" in str(error.value)
    assert "`scores_text`: it is True if" in str(error.value)
