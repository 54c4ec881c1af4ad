"""Drawn tokens are kept with their text: they end at any end token, train as drawn, and have the same probability."""

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.cli import check_run
from tests.helpers.models import pretrained, save_two_ends
from tests.helpers.runs import composed, write_lines
from var.data.chat import Chat
from var.data.row import Response
from var.models.packing import pack_tree
from var.models.policy import Policy
from var.sampling import local
from var.sampling.base import Sample, Sampling
from var.sampling.local import sample, sample_tokens
from var.training import module as module_module
from var.training.datamodule import AlignmentData
from var.training.run import Run
from var.training.validation import Validation

SAMPLING = Sampling(responses=6, temperature=1.0, top_p=1.0, max_new_tokens=40, batch=64, batch_tokens=65_536, seed=0)
END, STOP, USER, BYTE = 257, 261, 258, 187  # BYTE is 0xff, which is in no text
GENERATE = ["generate.responses=3", "generate.max_new_tokens=12"]


def ask(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def retokenize(chat: Chat, sample: Sample) -> list[int]:
    """Return the tokens of a sample's text."""
    return chat.tokenize_answer(sample.text, sample.finished)


# --- text and tokens


def test_sampling_stops_at_every_end_token(tmp_path: Path):
    """The end token is not part of the text, and other special tokens are.

    With the template's end token alone the same tokens are drawn, up to <stop>.
    """
    files = pretrained(save_two_ends(tmp_path / "model"), tmp_path)
    model, chat = files.load(), files.chat
    assert (chat.end_token, chat.end_tokens) == (END, {END, STOP})
    prompts = ask("ab", "a longer one", "c", "de")
    samples = list(chain(*sample(model, chat, prompts, SAMPLING)))
    assert {one.ids[-1] for one in samples if one.finished} == {END, STOP}
    for one in samples:
        assert one.finished == (one.ids[-1] in chat.end_tokens)
        assert not chat.end_tokens & set(one.ids[:-1])
        assert "<end>" not in one.text
        assert "<stop>" not in one.text
        assert one.text.count("<user>") == one.ids.count(USER)
    assert any(USER in one.ids for one in samples)
    chat.__dict__["end_tokens"] = frozenset({END})
    single = list(chain(*sample(model, chat, prompts, SAMPLING)))
    assert [one.ids[: len(other.ids)] for one, other in zip(single, samples, strict=True)] == [s.ids for s in samples]
    assert any(STOP in one.ids for one in single)


def test_answer_truncated_inside_a_character_keeps_its_tokens(tokenizer: Any):
    """The text ends before the character. All tokens train."""
    chat = Chat(tokenizer)
    a, *two_bytes = tokenizer("aé", add_special_tokens=False)["input_ids"]
    cut = Sample.of(chat, [a, two_bytes[0]])
    assert cut == ("a", False, (a, two_bytes[0]))
    assert Sample.of(chat, [two_bytes[0]]) == ("", False, (two_bytes[0],))
    assert Sample.of(chat, [a, *two_bytes]).text == "aé"
    assert Sample.of(chat, [a, two_bytes[0], END]) == ("a\ufffd", True, (a, two_bytes[0], END))
    (prompt,) = ask("x")
    response = Response(text=cut.text, finished=False, ids=cut.ids)
    assert chat.encode_response(prompt, response).ids == [*chat.prompt(prompt), a, two_bytes[0]]


def test_emoji_of_smollm2_is_truncated_between_its_tokens(smollm2: Path, tmp_path: Path):
    chat = pretrained(smollm2, tmp_path).chat
    ids = chat.tokenizer("so 🦩", add_special_tokens=False)["input_ids"]
    assert len(ids) > 3
    for length in range(2, len(ids)):
        found = Sample.of(chat, ids[:length])
        assert (found.text, found.tokens(chat)) == (found.text.rstrip("\ufffd"), ids[:length])
        assert found.text in ("so", "so ")
    assert Sample.of(chat, ids).text == "so 🦩"


def test_tokens_of_another_model_are_read_as_text(tokenizer: Any):
    """Tokens that give another text or another end, and ids that the model does not have."""
    chat = Chat(tokenizer, size=264)
    n, o = tokenizer("no", add_special_tokens=False)["input_ids"]
    for ids in ((5, 6, END), (n, o, 264, END), (n, o), (n, o, USER)):
        assert Sample("no", True, ids).tokens(chat) == [n, o, END]
    assert Sample("no", False, (n, o, END)).tokens(chat) == [n, o]
    assert Sample("no", True, (n, o, END)).tokens(chat) == [n, o, END]
    assert Sample("", True).tokens(chat) == [END]


def test_tokens_without_text_are_kept(tokenizer: Any):
    """A model can have more tokens than its tokenizer, as Qwen's models have."""
    chat = Chat(tokenizer, size=264)
    ids = (*tokenizer("no", add_special_tokens=False)["input_ids"], 263, END)
    assert Sample.of(chat, ids) == ("no", True, ids)
    assert Sample.of(chat, ids).tokens(chat) == list(ids)


# --- probabilities


@pytest.mark.parametrize("name", ["tiny", pytest.param("smollm2", marks=pytest.mark.long)])
def test_log_probabilities_equal_those_that_the_sampler_saw(
    name: str, tiny_folder: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    """For 200 answers at temperature 1 in float32, summed over tokens, with the end token of finished answers."""
    files = pretrained(tiny_folder if name == "tiny" else request.getfixturevalue("smollm2"), tmp_path)
    model, chat = files.load(), files.chat
    monkeypatch.setitem(local.CHECK_EVERY, "cpu", 1000)  # finished answers stay in their row
    seen, choose = list[torch.Tensor](), local.choose_tokens

    def record(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        tokens = choose(logits, *rest)
        seen.append(logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])
        return tokens

    monkeypatch.setattr(local, "choose_tokens", record)
    questions = ask(*(f"{'What is ' * (i % 3)}{i} plus {7 * i}?" for i in range(50)))
    prompts = sorted(map(chat.prompt, questions), key=lambda ids: (len(ids), ids))  # as they are sampled
    sampling = replace(SAMPLING, responses=4, max_new_tokens=24, batch=200)
    answers = sample_tokens(model, chat, prompts, sampling)
    logps = torch.stack(seen, 1)
    assert logps.shape == (200, 24)
    expected = torch.stack([row[: len(ids)].sum() for row, ids in zip(logps, chain(*answers), strict=True)])
    with torch.no_grad():
        batches = [pack_tree([prompt], [several]) for prompt, several in zip(prompts, answers, strict=True)]
        found = torch.cat([batch.sum_by_sequence(Policy(model)(batch)) for batch in batches])
    assert (found - expected).abs().max() < 1e-3
    assert any(ids[-1] in chat.end_tokens for ids in chain(*answers))
    texts = [Sample.of(chat, ids) for ids in chain(*answers)]
    assert any(retokenize(chat, one) != list(one.ids or ()) for one in texts)


# --- training


def check_drawn_tokens_train(data: AlignmentData) -> None:
    """Assert that each sequence is its prompt and the tokens of its response, some of which text would change."""
    found, chat, changed = data.training_set, data.annotator.chat, 0
    assert len(found.sequences) > 30
    for i in range(len(found.sequences)):
        row = found.rows[found.sequences.row[i]]
        response = row.responses[found.sequences.response[i]]
        ids, start, _ = found.sequences.tokens(i)
        assert ids == [*chat.prompt(row.prompt), *response.ids]
        assert ids[start:] == list(response.ids)
        changed += retokenize(chat, Sample(response.text, response.finished)) != ids[start:]
    assert changed > 10


def test_drawn_tokens_train_when_responses_are_sampled(options: list[str], tmp_path: Path):
    run = Run.compose(composed(*options, *GENERATE, "data.responses=sampled"), tmp_path)
    run.data.prepare()
    check_drawn_tokens_train(run.data)
    assert run.data.report.sampled_as_text is None


def test_rows_of_sample_py_train_as_drawn(options: list[str], tmp_path: Path):
    """The rows have ids. With edited text, ids of another model or without ids, a row trains as its text."""
    out = tmp_path / "rows.jsonl"
    check_run("sample.py", *options, *GENERATE, f"out={out}")
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(response["ids"] for record in records for response in record["responses"])
    run = Run.compose(composed(*options, f"data.path={out}", "data.responses=all"), tmp_path)
    run.data.prepare()
    check_drawn_tokens_train(run.data)
    first = records[0]["responses"][0]
    records[0]["responses"] = [{"text": "new", "ids": first["ids"]}, {"text": "new", "ids": [50_000]}, {"text": "new"}]
    write_lines(out, records)
    run = Run.compose(composed(*options, f"data.path={out}", "data.responses=all"), tmp_path)
    run.data.prepare()
    expected = run.annotator.chat.tokenize_answer("new", True)
    sequences = run.data.training_set.sequences
    for i in range(3):
        ids, start, _ = sequences.tokens(i)
        assert ids[start:] == expected
    assert sequences.counts["sampled by another tokenizer, so read as text"] == 2


def test_validation_measures_drawn_tokens(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Lengths and KL are those of the tokens that the policy drew."""
    drawn, real = list[list[list[int]]](), module_module.sample_tokens
    monkeypatch.setattr(
        module_module, "sample_tokens", lambda *arguments: (drawn.extend(out := real(*arguments)), out)[1]
    )
    more = ["data.validation_prompts=3", "eval.sampling.responses=4", "eval.sampling.max_new_tokens=12"]
    run = Run.compose(composed(*options, *more, "trainer.max_steps=2"), tmp_path)
    trainer, module = run.trainer(), run.module()
    trainer.fit(module, run.data)
    (validation,) = (callback for callback in trainer.callbacks if isinstance(callback, Validation))
    chat, rows = run.annotator.chat, run.data.training_set.validation
    assert [len(several) for several in drawn] == [4] * 3
    lengths = torch.tensor([len(ids) - (ids[-1] == END) for ids in chain(*drawn)], dtype=torch.float64)
    assert validation.result["after"]["length"]["mean"] == pytest.approx(float(lengths.mean()))
    batch = pack_tree([chat.prompt(row.prompt) for row in rows], drawn)
    with torch.no_grad():
        difference = batch.sum_by_sequence(module.policy(batch) - run.annotator.reference.policy(batch))
    assert validation.result["kl"]["mean"] == pytest.approx(float(difference.mean()), abs=1e-6)
    samples = [Sample.of(chat, ids) for ids in chain(*drawn)]
    assert sum(retokenize(chat, one) != list(one.ids or ()) for one in samples) > 3
