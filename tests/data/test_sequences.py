"""Sequences: the responses that data.responses chooses, and how long ones are truncated, dropped and counted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from notebooks.tiny import TEMPLATE, byte_tokenizer
from var.data.chat import Chat
from var.data.choice import choose, needs_rewards
from var.data.row import Response, Row
from var.data.rows import Rows, load, write
from var.data.sequences import Sequences, encode
from var.utils.errors import Problems, UserError
from var.utils.provenance import hash_content

END = 257
PROMPT = 6  # tokens of <bos><user>ab<end><assistant>


def make_rows(folder: Path, *rows: Row) -> Rows:
    write(rows, folder, Problems("rows"))
    return load(folder)


def row(name: str, *texts: str | Response, prompt: str = "ab", ordered: bool = False) -> Row:
    responses = tuple(Response(text=t) if isinstance(t, str) else t for t in texts)
    return Row(id=name, prompt=({"role": "user", "content": prompt},), responses=responses, ordered=ordered)


def encode_rows(
    tmp_path: Path, *rows: Row, max_length: int = 64, overlong: Any = "drop", pairs: bool = False,
    on_template_change: Any = "error", **chat: Any
) -> Sequences:  # fmt: skip
    """Encode all responses (with pairs the first and the last) with the byte tokenizer."""
    table = make_rows(tmp_path / hash_content([r.id for r in rows]).hex(), *rows)
    choice = choose(table, "both" if pairs else "all")
    limits = max_length, overlong, pairs, tmp_path / "cache", on_template_change
    return encode(table, choice, Chat(byte_tokenizer(**chat)), *limits)


def choose_indices(rows: Rows, switch: Any, rewards: list[list[float]] | None = None) -> list[tuple[int, int]]:
    choice = choose(rows, switch, None if rewards is None else np.concatenate(rewards))
    return list(zip(choice.row.tolist(), choice.response.tolist(), strict=True))


def test_each_setting_chooses_its_responses(tmp_path: Path):
    ordered = make_rows(tmp_path / "o", row("a", "x", "y", "z", ordered=True), row("b", "x", "y", ordered=True))
    assert choose_indices(ordered, "all") == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert choose_indices(ordered, "chosen") == [(0, 0), (1, 0)]
    assert choose_indices(ordered, "both") == [(0, 0), (0, 2), (1, 0), (1, 1)]
    assert choose_indices(ordered, "best", [[0, 2, 1], [5, 4]]) == [(0, 1), (1, 0)]
    unordered = make_rows(tmp_path / "u", row("a", "x", "y", "z"), row("b", "x", "y"))
    assert choose_indices(unordered, "both", [[0, 2, -1], [4, 5]]) == [(0, 1), (0, 2), (1, 1), (1, 0)]


def test_rows_without_a_pair_are_left_out_and_counted(tmp_path: Path):
    rows = make_rows(tmp_path, row("a", "x", "y"), row("b", "x"), row("c", "x", "y"), row("d"))
    choice = choose(rows, "both", np.array([1, 0, 1, 2, 2]))
    assert choice.row.tolist() == [0, 0]
    assert dict(choice.counts) == {
        "rows with fewer than two responses": 1, "rows whose responses all have the same reward": 1,
        "rows without a response": 1,
    }  # fmt: skip


def test_rows_without_a_response_are_always_counted(tmp_path: Path):
    """Sampling leaves such rows if all K responses were empty."""
    rows = make_rows(tmp_path, row("a", "x", ordered=True), row("b", ordered=True))
    for switch in ("all", "chosen", "best"):
        choice = choose(rows, switch, np.array([1.0]))
        assert (choice.row.tolist(), dict(choice.counts)) == ([0], {"rows without a response": 1})


def test_chosen_needs_ordered_rows(tmp_path: Path):
    rows = make_rows(tmp_path, row("a", "x", "y"), row("b", "x", ordered=True), row("c", "x"))
    with pytest.raises(UserError, match=r"data\.responses=chosen does not fit these rows \(2\):\n  row a: .*\n  row c"):
        choose(rows, "chosen")


def test_best_and_unordered_pairs_need_rewards(tmp_path: Path):
    ordered = make_rows(tmp_path / "o", row("a", "x", "y", ordered=True))
    mixed = make_rows(tmp_path / "m", row("a", "x", "y", ordered=True), row("b", "x", "y"))
    assert [needs_rewards(ordered, s) for s in ("all", "chosen", "both", "best")] == [False, False, False, True]
    assert [needs_rewards(mixed, s) for s in ("all", "chosen", "both", "best")] == [False, False, True, True]
    with pytest.raises(UserError, match=r"data\.responses=best needs the rewards"):
        choose(ordered, "best")


def test_tokens_lengths_and_columns(tmp_path: Path):
    """'xyz' is 3 bytes and the end token. Scores and weights stay with their response."""
    responses = (Response(text="xyz", score=2.0), Response(text="v", weight=0.5))
    sequences = encode_rows(tmp_path, row("a", *responses), row("b", "w"))
    assert (sequences.row.tolist(), sequences.start.tolist()) == ([0, 0, 1], [PROMPT] * 3)
    assert sequences.length.tolist() == [4, 2, 2]
    expected = Chat(byte_tokenizer()).encode(({"role": "user", "content": "ab"},), "xyz")
    assert sequences.tokens(0) == (expected.ids, PROMPT, "a#0")
    assert np.nan_to_num(sequences.column("score"), nan=-1).tolist() == [2, -1, -1]
    assert np.nan_to_num(sequences.column("weight"), nan=-1).tolist() == [-1, 0.5, -1]


def test_truncated_response_has_no_end_token(tmp_path: Path):
    """Truncation neither forces an EOS on a response nor leaves an empty one: huggingface/trl #6548.

    The limit leaves 3 tokens: 'xy' fits with its end token, 'xyz' loses it, 'wxyz' loses its last byte too.
    """
    sequences = encode_rows(tmp_path, row("a", "xy", "xyz", "wxyz"), max_length=PROMPT + 3, overlong="truncate")
    assert sequences.length.tolist() == [3, 3, 3]
    assert [sequences.tokens(i)[0][-1] == END for i in range(3)] == [True, False, False]
    assert dict(sequences.counts) == {"sequences truncated": 2}


def test_overlong_responses_are_dropped_and_counted(tmp_path: Path):
    sequences = encode_rows(tmp_path, row("a", "xy", "xyz"), row("b", "wxyz"), max_length=PROMPT + 3)
    assert [sequences.tokens(i)[2] for i in range(len(sequences))] == ["a#0"]
    assert dict(sequences.counts) == {"sequences dropped as overlong": 2}


def test_pair_is_dropped_together(tmp_path: Path):
    rows = (
        row("a", "x", "wxyz", ordered=True), row("b", "x", "y", ordered=True), row("c", "vwxyz", "wxyz", ordered=True),
    )  # fmt: skip
    sequences = encode_rows(tmp_path, *rows, max_length=PROMPT + 3, pairs=True)
    assert [sequences.tokens(i)[2] for i in range(len(sequences))] == ["b#0", "b#1"]
    assert dict(sequences.counts) == {"sequences dropped as overlong": 3, "sequences dropped with their pair": 1}


def test_pair_of_equal_tokens_is_left_out(tmp_path: Path):
    """The responses can be equal in the data, and after truncation. Such a pair would count as a wrong preference."""
    rows = (
        row("a", "wxyzv", "wxyzw", ordered=True), row("b", "x", "x", ordered=True), row("c", "x", "y", ordered=True),
        row("d", "wxyz", "w", ordered=True),
    )  # fmt: skip
    sequences = encode_rows(tmp_path, *rows, max_length=PROMPT + 3, overlong="truncate", pairs=True)
    assert [sequences.tokens(i)[2] for i in range(len(sequences))] == ["c#0", "c#1", "d#0", "d#1"]
    assert dict(sequences.counts) == {
        "sequences truncated": 3, "pairs skipped: both responses are the same tokens": 2
    }  # fmt: skip
    alone = encode_rows(tmp_path, rows[0], max_length=PROMPT + 6, pairs=True)
    assert len(alone) == 2


def test_prompt_that_fills_the_limit_is_dropped_or_an_error(tmp_path: Path):
    """Truncation to an empty response would give 0/0: huggingface/trl #3382."""
    rows = (row("a", "x"), row("long", "x", prompt="abcd"), row("longer", "x", prompt="abcde"))
    sequences = encode_rows(tmp_path, *rows, max_length=PROMPT + 2)
    assert len(sequences) == 1
    assert dict(sequences.counts) == {"sequences whose prompt fills the limit": 2}
    with pytest.raises(UserError) as error:
        encode_rows(tmp_path, *rows, max_length=PROMPT + 2, overlong="truncate")
    assert str(error.value).splitlines() == [
        "rows that cannot be tokenized (2):",
        "  row long#0: its prompt alone has 8 tokens; data.max_length=8",
        "  row longer#0: its prompt alone has 9 tokens; data.max_length=8",
        "Set data.overlong=drop to drop overlong rows, or increase data.max_length.",
    ]


def test_overlong_error_names_all_rows(tmp_path: Path):
    with pytest.raises(UserError) as error:
        encode_rows(tmp_path, row("a", "xyz", "x"), row("b", "wxyz"), max_length=PROMPT + 3, overlong="error")
    message = "  row a#0: it has 10 tokens; data.max_length=9\n  row b#0: it has 11 tokens; data.max_length=9\n"
    assert message in str(error.value)


def test_no_sequence_left_is_an_error_with_counts(tmp_path: Path):
    with pytest.raises(UserError, match=r"no sequence is left.*dropped as overlong: 2\).*Check data.responses"):
        encode_rows(tmp_path, row("a", "xyz", "wxyz"), max_length=PROMPT + 3)


def test_empty_rendered_responses_are_one_error(tmp_path: Path):
    """A mean over the tokens of an empty response would be 0/0: huggingface/trl #6548."""
    stripping = TEMPLATE.replace("m['content']", "m['content'] | trim")
    with pytest.raises(UserError) as error:
        encode_rows(tmp_path, row("a", " ", "x"), row("b", "\n"), template=stripping)
    fault = "the response is empty after rendering by the template"
    assert str(error.value).splitlines()[1:] == [f"  row a#0: {fault}", f"  row b#0: {fault}"]


def test_rows_whose_prompt_renders_differently_are_named(tmp_path: Path):
    """If the prompt is not a prefix of prompt + response, the mask shifts: huggingface/trl #5213."""
    template = TEMPLATE.replace("m['content']", "(m['content'] if loop.last else m['content'] | replace('#', ''))")
    with pytest.raises(UserError, match=r"\(1\):\n  row b#0: the template renders the prompt differently"):
        encode_rows(tmp_path, row("a", "x"), row("b", "y", prompt="#c"), template=template)


@pytest.mark.parametrize("begin", ["<t></t>", "<t>"])
def test_text_that_the_template_adds_is_an_error_or_counted(
    begin: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A template that adds an empty reasoning block, as several do. Both are also found if the tokens are cached."""
    content = f"(m['content'] if m.role != 'assistant' or '</t>' in m.content else '{begin}' + m['content'])"
    template = TEMPLATE.replace("m['content']", content)
    rows = (row("a", "x", "<t>y</t>z"), row("b", "w"))
    for _ in range(2):
        with pytest.raises(UserError, match="on_template_change=count trains on what it writes") as error:
            encode_rows(tmp_path, *rows, template=template)
        assert str(error.value).splitlines()[1:3] == [
            f"  row a#0: the response is {{+{begin}+}}x", f"  row b#0: the response is {{+{begin}+}}w"
        ]  # fmt: skip
    for _ in range(2):
        sequences = encode_rows(tmp_path, *rows, template=template, on_template_change="count")
        assert sequences.counts == {"sequences changed by the template": 2}
        ids, start, _ = sequences.tokens(0)
        assert byte_tokenizer().decode(ids[start:]) == f"{begin}x<end>"
        printed = capsys.readouterr().out.replace("\n", " ")
        warning = f"changes 2 rows, which train as it writes them. row a#0: the response is {{+{begin}+}}x"
        assert printed.count(warning) == printed.count("Warning") == 1
    with pytest.raises(UserError, match=r"row a#0: the response is"):
        encode_rows(tmp_path, *rows, template=template)


def test_control_tokens_in_text_are_counted_and_do_not_end_a_turn(tmp_path: Path):
    """The end token trains once, and no turn begins within a response or a prompt."""
    sequences = encode_rows(
        tmp_path, row("a", "x<end>", "y"), row("b", "x<end><user>y<end><assistant>z"), row("c", "v", prompt="<end>")
    )
    assert sequences.counts == {"sequences with control tokens, encoded as text": 3}
    tokenizer = byte_tokenizer()
    names = [tokenizer.convert_ids_to_tokens(sequences.tokens(i)[0]) for i in range(4)]
    special = ["<bos>", "<user>", "<end>", "<assistant>", "<end>"]
    assert [[name for name in each if name in tokenizer.all_special_tokens] for each in names] == [special] * 4
    assert "".join(names[1]) == "<bos><user>ab<end><assistant>y<end>"
    assert "".join(names[2]) == "<bos><user>ab<end><assistant>x<end><user>y<end><assistant>z<end>"


def test_all_responses_truncated_is_an_error(tmp_path: Path):
    """A model that never sees its end token never stops: huggingface/trl #1623. One row with it is enough."""
    cut = [Response(text=t, finished=False) for t in "xyz"]
    with pytest.raises(UserError, match="none ends with the template's end token and the model would never learn"):
        encode_rows(tmp_path, row("a", *cut))
    sequences = encode_rows(tmp_path, row("b", *cut[:2], "z"))
    assert [sequences.tokens(i)[0][-1] == END for i in range(3)] == [False, False, True]


def test_equal_prompts_share_a_group(tmp_path: Path):
    sequences = encode_rows(tmp_path, row("a", "x", "y"), row("b", "z", prompt="cd"), row("c", "w"))
    assert sequences.group.tolist() in ([0, 0, 1, 0], [1, 1, 0, 1])


def test_invalid_template_fails_before_the_first_row(tmp_path: Path):
    with pytest.raises(UserError, match=r"Set model\.chat_template"):
        encode_rows(tmp_path, row("a", "x"), template=TEMPLATE.replace(" + '<end>'", ""))
    assert not (tmp_path / "cache").exists()


def test_tokens_are_cached_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls, encode_one = list[Any](), Chat.encode
    monkeypatch.setattr(Chat, "encode", lambda *options: calls.append(options) or encode_one(*options))
    rows = make_rows(tmp_path / "rows", row("a", "x", "yz"), row("b", "toolong"))
    choice, cache = choose(rows, "all"), tmp_path / "cache"

    def encode_again(
        template: str = TEMPLATE, limit: int = PROMPT + 4, overlong: Any = "drop", these: Any = choice
    ) -> Sequences:
        return encode(rows, these, Chat(byte_tokenizer(template)), limit, overlong, False, cache)

    first, second = encode_again(), encode_again()
    assert len(calls) == 3
    assert first.counts == second.counts == {"sequences dropped as overlong": 1}
    assert [first.tokens(i) for i in range(2)] == [second.tokens(i) for i in range(2)]
    file = Path(second.table.cache_files[0]["filename"])
    assert file.is_relative_to(cache)  # memory-mapped, not copied
    assert file.name == "sequences.arrow"
    assert json.loads((file.parent / "done.json").read_text())["facts"]["counts"] == dict(first.counts)
    for change in (
        {"limit": 64}, {"overlong": "truncate"}, {"template": TEMPLATE.replace("'<end>'", "'<end>\n'")},
        {"these": choose(rows.select(np.array([0])), "all")},
    ):  # fmt: skip
        before = len(calls)
        encode_again(**change)
        assert len(calls) > before


def test_cached_tokens_depend_on_the_special_tokens_that_the_template_writes(tmp_path: Path) -> None:
    """Not on others. The template `plain` writes bos_token and eos_token."""
    table = make_rows(tmp_path / "rows", row("a", "x"))

    def find(template: str, bos: str | None) -> list[int]:
        tokenizer = byte_tokenizer()
        tokenizer.bos_token = bos
        chat = Chat(tokenizer, template=template)
        return encode(table, choose(table, "all"), chat, 64, "drop", False, tmp_path / "cache").tokens(0)[0]

    assert len(find("plain", "<bos>")) == len(find("plain", None)) + 1
    without = TEMPLATE.replace("{{ bos_token }}", "<bos>")
    own = [Chat(byte_tokenizer(), template=without).template for _ in range(2)]
    own[1].tokenizer.bos_token = None
    assert own[0].fingerprint == own[1].fingerprint == without


def test_failed_encoding_is_not_cached(tmp_path: Path):
    for _ in range(2):
        with pytest.raises(UserError, match="it has 10 tokens"):
            encode_rows(tmp_path, row("a", "xyz", "x"), max_length=PROMPT + 3, overlong="error")
