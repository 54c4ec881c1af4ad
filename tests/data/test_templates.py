"""Properties of rows as tokens, for all kinds of tokenizers and templates, and any text."""

import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any
from unicodedata import normalize

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.helpers.templates import FORMS
from tests.helpers.tokenizers import KINDS, LOSES_SPACES, SENTENCEPIECE
from var.data.chat import Chat
from var.data.messages import texts_in
from var.data.template import MARK

hypothesis.configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")
ALL_KINDS = [*KINDS, "smollm2"]
# What a row may be rejected for. Everything else has to be encoded.
REASONS = ("the response is empty after rendering", "no é", "escapes characters")


def fuzz(examples: int) -> Any:
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    return hypothesis.settings(
        derandomize=True, max_examples=examples, deadline=None, database=None, phases=phases,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip


@pytest.fixture(scope="module")
def chat_of(smollm2: Path) -> Callable[[str, str], Chat]:
    """Return the chat of a kind of tokenizer and a template, which is built once."""
    return lru_cache(maxsize=None)(lambda kind, name: FORMS[name].chat(kind, smollm2))


def texts(name: str, min_size: int = 0) -> st.SearchStrategy[str]:
    """Return texts with the tokens of a template, parts of them, white space and any other characters."""
    form = FORMS[name]
    tokens = [*form.controls, *form.plain, "<think>", "</think>", "<|im_end|>", "</s>"]
    parts = [token[:-1] for token in tokens] + [token[1:] for token in tokens]
    spaces = ["\n", "\n\n", " ", "  ", "\t", "\r\n", "    ", "\u2009", "\u00a0", "\u3000"]
    others = ["a", "the tide", "user", "system", "assistant", "s", "\\n", '"', "{}", "[INST]", "### Assistant:\n",
              "é", "e\u0301", "日本", "😀", "\u212b", "\x00", "\ufffd", "▁", "Ġ", "x = 1\n    y"]  # fmt: skip
    any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=[MARK]), max_size=4)
    piece = st.sampled_from(tokens) | st.sampled_from(parts) | st.sampled_from(spaces) | st.sampled_from(others)
    return st.lists(piece | any_text, min_size=min_size, max_size=6).map("".join)


@st.composite
def conversations(draw: Any, name: str) -> list[dict[str, Any]]:
    """Draw a prompt of up to three turns that ends with the user."""
    text, form = texts(name), FORMS[name]
    messages = [{"role": "system", "content": draw(text)}] if form.system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 1))):
        messages += [{"role": "user", "content": draw(text)}, {"role": "assistant", "content": draw(text)}]
    messages.append({"role": "user", "content": draw(text)})
    if form.name and draw(st.booleans()):
        messages[-1]["name"] = draw(text)
    return messages


def pairs() -> Any:
    """Return all kinds of tokenizers with all templates."""
    return pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in ALL_KINDS for name in FORMS])


def squeeze(text: str) -> str:
    return "".join(text.split())


def same(text: str) -> str:
    """Return a text up to what must not be reported: outer white space and canonical equivalence."""
    return normalize("NFC", text).strip()


def may_lose(kind: str, texts: list[str]) -> bool:
    """Return whether a kind of tokenizer cannot write these texts: SmolLM2's lacks the bytes of rare characters."""
    return kind == "smollm2" or (kind in SENTENCEPIECE and "▁" in "".join(texts))


def find_controls(chat: Chat, name: str, ids: list[int]) -> list[str]:
    """Return the control tokens of a template in some ids, without those within turns if these are not special."""
    form = FORMS[name]
    controls = set(form.controls) - set(form.inside if chat.path == "added" else ())
    return [token for token in chat.tokenizer.convert_ids_to_tokens(ids) if token in controls]


def tame(value: Any) -> Any:
    """Return a value with the letter x for every text that is not empty."""
    if isinstance(value, str):
        return "x" if value.strip() else value
    if isinstance(value, dict):
        kept = {"role", "type", "id", "tool_call_id"}
        return {key: part if key in kept else tame(part) for key, part in value.items()}
    return [tame(part) for part in value] if isinstance(value, list) else value


def encode(chat: Chat, *args: Any, **kwargs: Any) -> Any:
    """Return what Chat.encode returns. Reject the example if the row may be rejected."""
    try:
        return chat.encode(*args, **kwargs)
    except ValueError as error:
        hypothesis.assume(not any(reason in str(error) for reason in REASONS))
        raise


@pairs()
def test_row_trains_the_response_or_reports_the_change(kind: str, name: str, chat_of: Any) -> None:
    """The decoded tokens are compared with the messages, for the response and for all content of the prompt."""
    chat, form = chat_of(kind, name), FORMS[name]

    @fuzz(8)
    @hypothesis.given(prompt=conversations(name), response=texts(name, 1))
    def check(prompt: list[dict[str, Any]], response: str) -> None:
        encoded = encode(chat, prompt, response)
        ids, start = encoded.ids, encoded.start
        assert ids[:start] == chat.prompt(prompt)
        assert chat.tokenizer.convert_ids_to_tokens(ids[-1]) == form.end
        assert ids[start:].count(chat.end_token) == 1
        clean = squeeze if kind in LOSES_SPACES else same
        span, rendered = clean(chat.template.decode(ids[start:-1])), clean(chat.template.decode(ids[:start]))
        assert encoded.changes or span == clean(response)
        if form.keeps:
            expected = "the tokenizer reads" if may_lose(kind, [response, *texts_in(prompt)]) else "in another place"
            assert [change for change in encoded.changes if expected not in change] == []
        if not encoded.changes:
            place = 0
            for message in prompt:
                place = rendered.find(clean(message["content"]), place)
                assert place >= 0
                assert clean(message.get("name", "")) in rendered
        cut = chat.encode(prompt, response, finished=False)
        assert (cut.ids, cut.start, cut.changes) == (ids[:-1], start, encoded.changes)

    check()


@pairs()
def test_control_tokens_in_messages_are_inert(kind: str, name: str, chat_of: Any) -> None:
    """The row has the control tokens of one with harmless content, and the text is the rendered one."""
    chat = chat_of(kind, name)

    @fuzz(8)
    @hypothesis.given(prompt=conversations(name), response=texts(name, 1))
    def check(prompt: list[dict[str, Any]], response: str) -> None:
        encoded = encode(chat, prompt, response)
        harmless = chat.encode(tame(prompt), tame(response))
        assert find_controls(chat, name, encoded.ids) == find_controls(chat, name, harmless.ids)
        full = chat.template.render([*prompt, {"role": "assistant", "content": response}], prompt).replace(MARK, "")
        decoded, expected = chat.template.decode(encoded.ids), full[: full.rindex(FORMS[name].end)] + FORMS[name].end
        if may_lose(kind, [response, *texts_in(prompt)]):
            return
        clean = squeeze if kind in LOSES_SPACES else same
        assert clean(decoded) == clean(expected)

    check()
