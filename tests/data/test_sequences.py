"""Sequences: which responses train under each switch, and what is cut, dropped and counted on the way to tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from notebooks.tiny import TEMPLATE, byte_tokenizer
from var.data.chat import Chat
from var.data.rows import Response, Row, Rows, load, write
from var.data.sequences import Sequences, choose, encode, needs_rewards
from var.utils.errors import Problems, UserError
from var.utils.provenance import hash_content

END = 257
PROMPT = 6  # tokens of <bos><user>ab<end><assistant>


def rows_of(folder: Path, *rows: Row) -> Rows:
    write(rows, folder, Problems("rows"))
    (folder / "done.json").write_text('{"left_out": 0}')
    return load(folder)


def row(name: str, *texts: str | Response, prompt: str = "ab", ordered: bool = False) -> Row:
    responses = tuple(Response(text=t) if isinstance(t, str) else t for t in texts)
    return Row(id=name, prompt=({"role": "user", "content": prompt},), responses=responses, ordered=ordered)


def encoded(
    tmp_path: Path, *rows: Row, max_length: int = 64, overlong: Any = "drop", pairs: bool = False, **chat: Any
) -> Sequences:
    """All responses (the first and the last with pairs), under the byte tokenizer."""
    table = rows_of(tmp_path / hash_content([r.id for r in rows]).hex(), *rows)
    choice = choose(table, "both" if pairs else "all")
    return encode(table, choice, Chat(byte_tokenizer(**chat)), max_length, overlong, pairs, tmp_path / "cache")


def picked(rows: Rows, switch: Any, rewards: list[list[float]] | None = None) -> list[tuple[int, int]]:
    choice = choose(rows, switch, None if rewards is None else [np.array(r) for r in rewards])
    return list(zip(choice.row.tolist(), choice.response.tolist(), strict=True))


def test_each_switch_picks_its_responses(tmp_path: Path):
    ordered = rows_of(tmp_path / "o", row("a", "x", "y", "z", ordered=True), row("b", "x", "y", ordered=True))
    assert picked(ordered, "all") == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert picked(ordered, "chosen") == [(0, 0), (1, 0)]
    assert picked(ordered, "both") == [(0, 0), (0, 2), (1, 0), (1, 1)]
    assert picked(ordered, "best", [[0, 2, 1], [5, 4]]) == [(0, 1), (1, 0)]
    unordered = rows_of(tmp_path / "u", row("a", "x", "y", "z"), row("b", "x", "y"))
    assert picked(unordered, "both", [[0, 2, -1], [4, 5]]) == [(0, 1), (0, 2), (1, 1), (1, 0)]


def test_rows_that_make_no_pair_are_left_out_and_counted(tmp_path: Path):
    rows = rows_of(tmp_path, row("a", "x", "y"), row("b", "x"), row("c", "x", "y"), row("d"))
    choice = choose(rows, "both", [np.array(r) for r in ([1, 0], [1], [2, 2], [])])
    assert choice.row.tolist() == [0, 0]
    assert dict(choice.counts) == {
        "rows with fewer than two responses": 1, "rows whose responses have one reward": 1,
        "rows without a response": 1,
    }  # fmt: skip


def test_a_row_without_a_response_is_counted_under_every_switch(tmp_path: Path):
    """As sampling leaves it where all K answers were empty."""
    rows = rows_of(tmp_path, row("a", "x", ordered=True), row("b", ordered=True))
    for switch in ("all", "chosen", "best"):
        choice = choose(rows, switch, [np.array([1.0]), np.array([])])
        assert (choice.row.tolist(), dict(choice.counts)) == ([0], {"rows without a response": 1})


def test_chosen_needs_an_order(tmp_path: Path):
    rows = rows_of(tmp_path, row("a", "x", "y"), row("b", "x", ordered=True), row("c", "x"))
    with pytest.raises(UserError, match=r"data\.responses=chosen does not fit these rows \(2\):\n  row a: .*\n  row c"):
        choose(rows, "chosen")


def test_rewards_are_needed_for_best_and_for_pairs_without_an_order(tmp_path: Path):
    ordered = rows_of(tmp_path / "o", row("a", "x", "y", ordered=True))
    mixed = rows_of(tmp_path / "m", row("a", "x", "y", ordered=True), row("b", "x", "y"))
    assert [needs_rewards(ordered, s) for s in ("all", "chosen", "both", "best")] == [False, False, False, True]
    assert [needs_rewards(mixed, s) for s in ("all", "chosen", "both", "best")] == [False, False, True, True]


def test_tokens_lengths_and_columns(tmp_path: Path):
    """'xyz' is 3 bytes and the end token; the score and the weight stay with their response."""
    responses = (Response(text="xyz", score=2.0), Response(text="v", weight=0.5))
    sequences = encoded(tmp_path, row("a", *responses), row("b", "w"))
    assert (sequences.row.tolist(), sequences.start.tolist()) == ([0, 0, 1], [PROMPT] * 3)
    assert sequences.length.tolist() == [4, 2, 2]
    ids, start, name = sequences.tokens(0)
    assert (ids[start:], start, name) == (
        [*Chat(byte_tokenizer()).encode(({"role": "user", "content": "ab"},), "xyz").ids[6:]],
        6,
        "a#0",
    )
    assert np.nan_to_num(sequences.column("score"), nan=-1).tolist() == [2, -1, -1]
    assert np.nan_to_num(sequences.column("weight"), nan=-1).tolist() == [-1, 0.5, -1]


def test_a_cut_answer_has_no_end_token(tmp_path: Path):
    """Truncation never forces an EOS on a cut response, nor leaves an empty one: huggingface/trl #6548.

    The limit leaves 3 tokens: 'xy' fits with its end token, 'xyz' loses it, 'wxyz' loses its last byte too.
    """
    sequences = encoded(tmp_path, row("a", "xy", "xyz", "wxyz"), max_length=PROMPT + 3, overlong="truncate")
    assert sequences.length.tolist() == [3, 3, 3]
    assert [sequences.tokens(i)[0][-1] == END for i in range(3)] == [True, False, False]
    assert dict(sequences.counts) == {"sequences cut": 2}


def test_overlong_answers_are_dropped_and_counted(tmp_path: Path):
    sequences = encoded(tmp_path, row("a", "xy", "xyz"), row("b", "wxyz"), max_length=PROMPT + 3)
    assert [sequences.tokens(i)[2] for i in range(len(sequences))] == ["a#0"]
    assert dict(sequences.counts) == {"sequences dropped as overlong": 2}


def test_a_pair_is_dropped_together(tmp_path: Path):
    rows = (
        row("a", "x", "wxyz", ordered=True), row("b", "x", "y", ordered=True), row("c", "vwxyz", "wxyz", ordered=True),
    )  # fmt: skip
    sequences = encoded(tmp_path, *rows, max_length=PROMPT + 3, pairs=True)
    assert [sequences.tokens(i)[2] for i in range(len(sequences))] == ["b#0", "b#1"]
    assert dict(sequences.counts) == {"sequences dropped as overlong": 3, "sequences dropped with their pair": 1}


def test_a_prompt_that_fills_the_limit_is_never_trained(tmp_path: Path):
    """Truncation that leaves an empty response gives 0/0: huggingface/trl #3382. Dropped and counted, or an error."""
    rows = (row("a", "x"), row("long", "x", prompt="abcd"), row("longer", "x", prompt="abcde"))
    sequences = encoded(tmp_path, *rows, max_length=PROMPT + 2)
    assert len(sequences) == 1
    assert dict(sequences.counts) == {"sequences whose prompt fills the limit": 2}
    with pytest.raises(UserError) as error:
        encoded(tmp_path, *rows, max_length=PROMPT + 2, overlong="truncate")
    assert str(error.value).splitlines() == [
        "rows that cannot be tokenised (2):",
        "  row long#0: its prompt alone has 8 tokens; data.max_length=8",
        "  row longer#0: its prompt alone has 9 tokens; data.max_length=8",
        "Set data.overlong=drop to leave overlong rows out, or raise data.max_length.",
    ]


def test_overlong_as_an_error_names_all_rows_at_once(tmp_path: Path):
    with pytest.raises(UserError) as error:
        encoded(tmp_path, row("a", "xyz", "x"), row("b", "wxyz"), max_length=PROMPT + 3, overlong="error")
    lines = str(error.value).splitlines()
    assert lines[1:3] == [
        "  row a#0: it has 10 tokens; data.max_length=9", "  row b#0: it has 11 tokens; data.max_length=9",
    ]  # fmt: skip


def test_nothing_left_is_an_error_with_the_counts(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"no sequence is left.*sequences dropped as overlong.*2.*raise data.max_length"
    ):
        encoded(tmp_path, row("a", "xyz", "wxyz"), max_length=PROMPT + 3)


def test_rows_without_a_response_token_are_named_all_at_once(tmp_path: Path):
    """An empty response after rendering is 0/0 in a mean over tokens: huggingface/trl #6548."""
    stripping = TEMPLATE.replace("m['content']", "m['content'] | trim")
    with pytest.raises(UserError) as error:
        encoded(tmp_path, row("a", " ", "x"), row("b", "\n"), template=stripping)
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines[1:3]] == ["  row a#0", "  row b#0"]
    assert all("the response is empty once the template has rendered it" in line for line in lines[1:3])


def test_rows_whose_prompt_is_no_prefix_are_named(tmp_path: Path):
    """Prompt tokens that are no prefix of prompt + response shift the mask: huggingface/trl #5213."""
    template = TEMPLATE.replace("m['content']", "(m['content'] if loop.last else m['content'] | replace('#', ''))")
    with pytest.raises(UserError, match=r"\(1\):\n  row b#0: the template renders the prompt differently"):
        encoded(tmp_path, row("a", "x"), row("b", "y", prompt="#c"), template=template)


def test_a_share_of_no_end_tokens_at_all_is_refused(tmp_path: Path):
    """A model never shown its end token never stops: huggingface/trl #1623. One row of three that ends will do."""
    cut = [Response(text=t, finished=False) for t in "xyz"]
    with pytest.raises(UserError, match="none ends with the template's end token; the model would never learn to stop"):
        encoded(tmp_path, row("a", *cut))
    sequences = encoded(tmp_path, row("b", *cut[:2], "z"))
    assert [sequences.tokens(i)[0][-1] == END for i in range(3)] == [False, False, True]


def test_every_finished_row_ends_with_the_end_token_though_pad_is_eos(tmp_path: Path):
    """huggingface/trl #1623, #2059: labels come from spans, so the end token is trained in every row."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    rows = rows_of(tmp_path / "rows", row("a", "x", "yz"), row("b", "w"))
    sequences = encode(rows, choose(rows, "all"), Chat(tokenizer), 64, "drop", False, tmp_path)
    ends = [sequences.tokens(i)[0][-1] for i in range(3)]
    assert ends == [END] * 3
    assert sequences.length.tolist() == [2, 3, 2]


def test_rows_of_one_prompt_share_a_group(tmp_path: Path):
    sequences = encoded(tmp_path, row("a", "x", "y"), row("b", "z", prompt="cd"), row("c", "w"))
    assert sequences.group.tolist() in ([0, 0, 1, 0], [1, 1, 0, 1])


def test_a_template_that_cannot_be_trained_fails_before_the_first_row(tmp_path: Path):
    with pytest.raises(UserError, match=r"set model\.chat_template"):
        encoded(tmp_path, row("a", "x"), template=TEMPLATE.replace(" + '<end>'", ""))
    assert not (tmp_path / "cache").exists()


class Counting(Chat):
    calls = 0

    def encode(self, *given: Any, **more: Any) -> Any:
        Counting.calls += 1
        return super().encode(*given, **more)


@pytest.fixture
def counting() -> type[Counting]:
    Counting.calls = 0
    return Counting


def test_tokens_are_kept_by_content_and_read_from_there(tmp_path: Path, counting: type[Counting]):
    rows = rows_of(tmp_path / "rows", row("a", "x", "yz"), row("b", "toolong"))
    choice, cache = choose(rows, "all"), tmp_path / "cache"

    def again(
        template: str = TEMPLATE, limit: int = PROMPT + 4, overlong: Any = "drop", these: Any = choice
    ) -> Sequences:
        return encode(rows, these, counting(byte_tokenizer(template)), limit, overlong, False, cache)

    first, second = again(), again()
    assert counting.calls == 3
    assert first.counts == second.counts == {"sequences dropped as overlong": 1}
    assert [first.tokens(i) for i in range(2)] == [second.tokens(i) for i in range(2)]
    file = Path(second.table.cache_files[0]["filename"])
    assert file.is_relative_to(cache)  # a memory map of the file, not a copy of it
    assert file.name == "sequences.arrow"
    assert json.loads((file.parent / "done.json").read_text())["counts"] == dict(first.counts)
    for change in (
        {"limit": 64}, {"overlong": "truncate"}, {"template": TEMPLATE.replace("'<end>'", "'<end>\n'")},
        {"these": choose(rows.select(np.array([0])), "all")},
    ):  # fmt: skip
        before = counting.calls
        again(**change)
        assert counting.calls > before


def test_a_failed_write_is_not_taken_for_a_finished_one(tmp_path: Path):
    for _ in range(2):
        with pytest.raises(UserError, match="it has 10 tokens"):
            encoded(tmp_path, row("a", "xyz", "x"), max_length=PROMPT + 3, overlong="error")
