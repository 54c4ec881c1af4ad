"""Properties of rows as tokens, for all kinds of tokenizers and templates, and any text."""

import datetime
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any
from unicodedata import normalize

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.helpers.small_tokenizers import KINDS, LOSES_SPACES, SENTENCEPIECE
from tests.helpers.templates import CHATML, FORMS
from var.data.chat import Chat
from var.data.messages import Prompt, texts_in
from var.data.row import Response
from var.data.template import MARK

hypothesis.configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")
# What a row may be rejected for. Everything else has to be encoded.
REASONS = ("the response is empty after rendering", "no é", "escapes characters")
PAIRS = [(kind, name) for kind in KINDS for name in FORMS if kind != "split" and name != "own"]
PAIRS += [("smollm2", name) for name in ("own", "llama3", "qwen3", "mistral", "plain")]
TOOL_PAIRS = [(kind, name) for kind, name in PAIRS if FORMS[name].tools]


def fuzz(examples: int) -> Any:
    """Return settings that generate the same examples in every run."""
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    checks = list(hypothesis.HealthCheck)
    return hypothesis.settings(
        derandomize=True, max_examples=examples, deadline=None, database=None, phases=phases, print_blob=False,
        suppress_health_check=checks,
    )  # fmt: skip


def each(pairs: list[tuple[str, str]], few: int, many: int) -> Any:
    """Run a test for kinds of tokenizers and templates with a few examples, and with many as a long test."""
    short = [pytest.param(*pair, few, id="-".join(pair)) for pair in pairs]
    long = [pytest.param(*pair, many, id="-".join(pair) + "-long", marks=pytest.mark.long) for pair in pairs]
    return pytest.mark.parametrize(("kind", "name", "examples"), short + long)


@pytest.fixture(scope="module")
def chat_of(smollm2: Path) -> Callable[[str, str], Chat]:
    """Return the chat of a kind of tokenizer and a template, which is built once."""
    return lru_cache(maxsize=None)(lambda kind, name: FORMS[name].chat(kind, smollm2))


def texts(name: str, min_size: int = 0) -> st.SearchStrategy[str]:
    """Return texts with the tokens of a template, parts of them, white space and any other characters."""
    tokens = [*FORMS[name].controls, *FORMS[name].plain, "<think>", "</think>", "<|im_end|>", "</s>"]
    parts = [token[:-1] for token in tokens] + [token[1:] for token in tokens]
    spaces = ["\n", "\n\n", " ", "  ", "\t", "\r\n", "    ", "\u2009", "\u00a0", "\u3000"]
    others = [
        "a", "the tide", "user", "system", "assistant", "s", "\\n", '"', "{}", "[INST]", "### Assistant:\n", "é",
        "e\u0301", "日本", "😀", "\u212b", "\x00", "\ufffd", "\ufdd1", "▁", "Ġ", "x = 1\n    y", "{{ m }}", "\\u00e9",
    ]  # fmt: skip
    characters = st.characters(exclude_categories=["Cs"], exclude_characters=[MARK])
    pieces = [st.sampled_from(choices) for choices in (tokens, parts, spaces, others)]
    return st.lists(st.one_of(*pieces, st.text(characters, max_size=4)), min_size=min_size, max_size=6).map("".join)


@st.composite
def conversations(draw: Any, name: str) -> Prompt:
    """Draw a prompt of up to four turns that ends with the user."""
    text, form = texts(name), FORMS[name]
    messages = [{"role": "system", "content": draw(text)}] if form.system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 1))):
        messages += [{"role": "user", "content": draw(text)}, {"role": "assistant", "content": draw(text)}]
    messages.append({"role": "user", "content": draw(text)})
    if form.name and draw(st.booleans()):
        messages[-1]["name"] = draw(text)
    return Prompt(messages)


@st.composite
def tool_calls(draw: Any, name: str) -> list[dict[str, Any]]:
    """Draw the value of a message's key tool_calls."""
    text = texts(name)
    arguments = draw(st.dictionaries(text, text | st.lists(text, max_size=2) | st.integers(), max_size=2))
    function = {"name": draw(text), "arguments": arguments}
    return [{"id": "call00001", "type": "function", "function": function}]


@st.composite
def tool_conversations(draw: Any, name: str) -> Prompt:
    """Draw a prompt with tools that ends with the result of one."""
    text = texts(name)
    schema = {"type": "object", "properties": {draw(text): {"type": "string", "description": draw(text)}}}
    tool = {"type": "function", "function": {"name": draw(text), "description": draw(text), "parameters": schema}}
    messages = [
        {"role": "user", "content": draw(text)},
        {"role": "assistant", "content": None, "tool_calls": draw(tool_calls(name))},
        {"role": "tool", "content": draw(text), **({"tool_call_id": "call00001"} if name == "mistral" else {})},
    ]
    return Prompt(messages, [tool])


def squeeze(text: str) -> str:
    return "".join(normalize("NFC", text).split())


def cleaner(kind: str) -> Callable[[str], str]:
    """Return a function that removes what must not be reported: outer white space and canonical equivalence.

    The decoded text of some tokenizers has other spaces around their control tokens.
    """
    return squeeze if kind in LOSES_SPACES else lambda text: normalize("NFC", text).strip()


def may_lose(kind: str, value: Any) -> bool:
    """Return whether a kind of tokenizer cannot write some texts: SmolLM2's lacks the bytes of rare characters."""
    return kind == "smollm2" or (kind in SENTENCEPIECE and "▁" in "".join(texts_in(value)))


def find_controls(chat: Chat, name: str, ids: list[int]) -> list[str]:
    """Return the control tokens of a template in some ids, without those within turns if these are not special."""
    form = FORMS[name]
    controls = set(form.controls) - set(form.inside if chat.path == "added" else ())
    return [token for token in chat.tokenizer.convert_ids_to_tokens(ids) if token in controls]


def tame(value: Any) -> Any:
    """Return messages with the letter x for every text that is not empty."""
    if isinstance(value, Prompt):
        return Prompt(tame(list(value)), tame(list(value.tools)))
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
        # SmolLM2's token for characters that it lacks, such as U+0004, also ends a text.
        unwritable = ("cannot write as text",) if chat.tokenizer.unk_token_id in chat.end_tokens else ()
        hypothesis.assume(not any(reason in str(error) for reason in (*REASONS, *unwritable)))
        raise


def check_row(chat: Chat, name: str, prompt: Prompt, encoded: Any) -> None:
    """Check what holds for every row: its prompt, its one end token, and its control tokens."""
    ids, start = encoded.ids, encoded.start
    assert ids[:start] == chat.prompt(prompt)
    assert chat.tokenizer.convert_ids_to_tokens(ids[-1]) == FORMS[name].end
    assert ids[start:].count(chat.end_token) == 1


@each(PAIRS, few=3, many=150)
def test_row_trains_the_response_or_reports_the_change(kind: str, name: str, examples: int, chat_of: Any) -> None:
    """The decoded tokens are compared with the response and with all content of the prompt.

    Control tokens in the messages are inert: the row has those of one with harmless content.
    """
    chat, form, clean = chat_of(kind, name), FORMS[name], cleaner(kind)

    @fuzz(examples)
    @hypothesis.given(prompt=conversations(name), response=texts(name, 1))
    def check(prompt: Prompt, response: str) -> None:
        encoded = encode(chat, prompt, response)
        ids, start, loses = encoded.ids, encoded.start, may_lose(kind, [*prompt, response])
        check_row(chat, name, prompt, encoded)
        harmless = chat.encode(tame(prompt), tame(response))
        assert find_controls(chat, name, ids) == find_controls(chat, name, harmless.ids)
        cut = chat.encode(prompt, response, finished=False)
        assert (cut.ids, cut.start, cut.changes) == (ids[:-1], start, encoded.changes)

        span, rendered = clean(chat.template.decode(ids[start:-1])), clean(chat.template.decode(ids[:start]))
        assert encoded.changes or span == clean(response)
        if form.keeps:
            expected = "the tokenizer reads" if loses else "in another place"
            assert [change for change in encoded.changes if expected not in change] == []
        if not encoded.changes:
            place = 0
            for message in prompt:
                place = rendered.find(clean(message["content"]), place)
                assert place >= 0
                assert clean(message.get("name", "")) in rendered
        if not loses:
            full = chat.template.render([*prompt, {"role": "assistant", "content": response}], prompt)
            text = full.replace(MARK, "")
            assert clean(chat.template.decode(ids)) == clean(text[: text.rindex(form.end)] + form.end)

    check()


@each(TOOL_PAIRS, few=3, many=150)
def test_tools_and_tool_calls_are_inert_and_kept(kind: str, name: str, examples: int, chat_of: Any) -> None:
    """Control tokens in their names, descriptions, arguments and results are text. A call can be the response."""
    chat, clean = chat_of(kind, name), cleaner(kind)

    @fuzz(examples)
    @hypothesis.given(prompt=tool_conversations(name), response=texts(name, 1), calls=tool_calls(name))
    def check(prompt: Prompt, response: str, calls: list[dict[str, Any]]) -> None:
        asked = Prompt(prompt[:1], prompt.tools)
        rows = [
            (prompt, encode(chat, prompt, response), chat.encode(tame(prompt), tame(response))),
            (asked, chat.encode(asked, "", further={"tool_calls": calls}),
             chat.encode(tame(asked), "", further={"tool_calls": tame(calls)})),
        ]  # fmt: skip
        for row, encoded, harmless in rows:
            check_row(chat, name, row, encoded)
            assert find_controls(chat, name, encoded.ids) == find_controls(chat, name, harmless.ids)
            assert not [change for change in encoded.changes if "not written" in change]
        if not may_lose(kind, calls) and name != "qwen3":
            assert not rows[1][1].changes
            written = clean(chat.template.decode(rows[1][1].ids[rows[1][1].start :]))
            for text in texts_in(calls[0]["function"]["arguments"]):
                escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
                assert not escaped.isprintable() or clean(escaped) in written

    check()


@each([pair for pair in PAIRS if pair[1] in ("chatml", "llama2", "mistral", "own", "r1")], few=5, many=300)
def test_sampled_tokens_and_answers_as_text(kind: str, name: str, examples: int, chat_of: Any) -> None:
    """Sampled tokens train as they were drawn, whatever they are. An answer that came as text is inert."""
    chat, clean = chat_of(kind, name), cleaner(kind)
    prompt = Prompt([{"role": "user", "content": "the tide"}])

    @fuzz(examples)
    @hypothesis.given(
        ids=st.lists(st.integers(0, len(chat.tokenizer) - 1), min_size=1, max_size=8), ends=st.booleans(),
        text=texts(name),
    )  # fmt: skip
    def check(ids: list[int], ends: bool, text: str) -> None:
        drawn = [*ids, *[chat.end_token] * ends]
        response = Response(text=chat.decode(drawn), ids=tuple(drawn), finished=chat.is_finished(drawn))
        encoded = chat.encode_response(prompt, response)
        assert (encoded.ids[: encoded.start], encoded.ids[encoded.start :]) == (chat.prompt(prompt), drawn)
        answer = chat.tokenize_answer(text, True)
        assert find_controls(chat, name, answer) == [FORMS[name].end]
        assert may_lose(kind, text) or clean(chat.decode(answer)) == clean(text)

    check()


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_harmless_rows_are_what_transformers_writes(kind: str, name: str, chat_of: Any) -> None:
    """The prompt and the row are those of apply_chat_template, if the response begins with a new token."""
    chat, form = chat_of(kind, name), FORMS[name]
    turns = [{"role": role, "content": f"{role}s say: 1, 2"} for role in ("system", "user", "assistant", "user")]
    prompt = turns if form.system else turns[1:]
    if form.name:
        prompt[-1]["name"] = "Ann"
    apply = chat.tokenizer.apply_chat_template
    assert chat.prompt(prompt) == apply(prompt, add_generation_prompt=True, return_dict=False)
    encoded = chat.encode(prompt, "It is four.")
    full = apply([*prompt, {"role": "assistant", "content": "It is four."}], return_dict=False)
    if full[: encoded.start] == chat.prompt(prompt):  # no token spans the prompt and the response
        assert encoded.ids == full[: len(encoded.ids)]
    assert not encoded.control


@pytest.mark.parametrize("name", [name for name in FORMS if name != "own"])
def test_keys_and_tools_are_reported_if_the_template_does_not_write_them(name: str, chat_of: Any) -> None:
    chat, form = chat_of("gpt2", name), FORMS[name]
    user = {"role": "user", "content": "the tide", "name": "Ann"}
    tool = {"type": "function", "function": {"name": "wall", "parameters": {}}}
    unused = ([] if form.name else ["name of the user's message 0"]) + ([] if form.tools else ["its tools"])
    assert [change.split(" is ")[0].split(" are ")[0] for change in chat.check_prompt(Prompt([user], [tool]))] == unused
    if form.tools:
        call = {"id": "call00001", "type": "function", "function": {"name": "wall", "arguments": {"at": 1}}}
        calling = {"role": "assistant", "content": None, "tool_calls": [call]}
        result = {"role": "tool", "content": "4", "tool_call_id": "call00001"}
        unread = [] if name == "mistral" else ["tool_call_id of the tool's message 2 is not written"]
        assert chat.check_prompt(Prompt([{**user, "name": ""}, calling, result], [tool])) == unread
    reasoned = chat.encode([{**user, "name": ""}], "4", further={"reasoning_content": "2 + 2"})
    assert reasoned.changes == (() if name == "qwen3" else ("reasoning_content of the response is not written",))


CALLS = [
    {"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": {"at": 10 + i, "note": 'so "on"'}}}
    for i, name in enumerate(["wall", "tide"])
]  # fmt: skip


def write_content(chat: Chat, content: str) -> Chat:
    """Let a template write an expression in place of a message's content, and macros for what it has further."""
    calls = "{% macro each(m) %}{% for c in m.tool_calls or [] %}{{ CALL }}{% endfor %}{% endmacro %}"
    call, _, body = content.rpartition(" in ")
    chat.tokenizer.chat_template = calls.replace("CALL", call or "''") + CHATML.replace("m.content", f"({body})")
    return chat


@pytest.mark.parametrize(
    ("call", "changes"),
    [
        ("c.function | tojson", ()),
        ("c.function.name ~ c.function.arguments", ()),
        ("c.function.name", ("tool_calls of the response is written without '10'",)),
        ("(c.function | tojson) if loop.first else ''", ("tool_calls of the response is written without 'tide'",)),
    ],
)
def test_parts_of_tool_calls_that_are_not_written_are_reported(call: str, changes: Any, smollm2: Path) -> None:
    """Of the response and of a prompt; ids and types of calls are not expected."""
    chat = write_content(FORMS["chatml"].chat("gpt2", smollm2), f"{call} in each(m) ~ m.content")
    user = {"role": "user", "content": "a"}
    assert chat.encode([user], "b", further={"tool_calls": CALLS}).changes == changes
    earlier = [user, {"role": "assistant", "content": "b", "tool_calls": CALLS}, user]
    assert chat.check_prompt(earlier) == [c.replace("response", "assistant's message 1") for c in changes]


@pytest.mark.parametrize(
    ("content", "changes"),
    [
        ("('<think>' ~ m.thought ~ '</think>' if m.thought else '') ~ m.content", ()),
        ("(m.thought or '')[:3] ~ m.content", ("thought of the response is written without 'two and two'",)),
        ("(m.thought ~ m.content if m.thought else '') ~ m.content", ("the response is written 2 times",)),
    ],
)
def test_reasoning_that_is_cut_and_text_that_is_doubled_are_reported(content: str, changes: Any, smollm2: Path) -> None:
    chat = write_content(FORMS["chatml"].chat("gpt2", smollm2), content)
    encoded = chat.encode([{"role": "user", "content": "a"}], "four", further={"thought": "two and two"})
    assert encoded.changes == changes


def test_tool_that_is_not_written_is_reported(smollm2: Path) -> None:
    chat = FORMS["chatml"].chat("gpt2", smollm2)
    chat.tokenizer.chat_template = "{{ tools[0] | tojson if tools else '' }}" + CHATML
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("wall", "tide")]
    assert chat.check_prompt(Prompt([{"role": "user", "content": "a"}], tools)) == ["its tool 'tide' is not written"]


def test_block_that_the_generation_prompt_has_opened_is_reported(smollm2: Path) -> None:
    """The response would train a second <think>."""
    chat = FORMS["chatml"].chat("gpt2", smollm2)
    opened = CHATML.replace("<|im_start|>assistant\\n", "<|im_start|>assistant\\n<think>\\n")
    chat.tokenizer.chat_template = opened.replace(
        "~ m.content", "~ ('<think>\\n' if m.role == 'assistant' else '') ~ m.content"
    )
    user = [{"role": "user", "content": "a"}]
    assert chat.encode(user, "hm</think>4").changes == ()
    doubled = "the response begins with <think>, which the generation prompt has written"
    assert chat.encode(user, "<think>hm</think>4").changes == (doubled,)


@pytest.mark.parametrize("name", ["role", "m", "mood", "bos_token", "messages"])
def test_name_that_is_no_argument_of_the_template_is_an_error(name: str, smollm2: Path) -> None:
    """Names of attributes, of loops and in comments are not arguments, and special tokens are the tokenizer's."""
    chat = FORMS["chatml"].chat("gpt2", smollm2)
    chat.tokenizer.chat_template = "{# mood #}{{ bos_token or '' }}" + CHATML
    with pytest.raises(ValueError, match=f"does not read {name}"):
        chat.prompt(Prompt([{"role": "user", "content": "a"}], (), {name: "x"}))


@pytest.mark.parametrize("content", ["s", "user", "system", "a long text of the system", "\n"])
def test_dropped_content_is_reported_if_its_text_is_elsewhere(content: str, chat_of: Any) -> None:
    """The text `s` is also in the header of a turn."""
    prompt = [{"role": "system", "content": content}, {"role": "user", "content": content}]
    changes = chat_of("gpt2", "drops").check_prompt(prompt)
    assert changes == ([f"the system's message 0 is not as written, {content!r}"] if content.strip() else [])


def test_moved_changed_and_truncated_content_is_reported(chat_of: Any) -> None:
    turns = [{"role": role, "content": f"TURN {i}"} for i, role in enumerate(["system", "user", "assistant", "user"])]
    assert chat_of("gpt2", "mistral").check_prompt(turns) == ["the system's message 0 is in another place"]
    assert chat_of("gpt2", "lowers").check_prompt(turns[:1] + turns[3:]) == [
        "the system's message 0 is [-TURN-]{+turn+} 0", "the user's message 1 is [-TURN-]{+turn+} 3",
    ]  # fmt: skip
    long = [{"role": "user", "content": "the harbour wall"}]
    assert chat_of("gpt2", "cuts").check_prompt(long) == ["the user's message 0 is not as written, 'the harbour wall'"]


def test_characters_that_a_tokenizer_loses_are_reported(smollm2: Path, chat_of: Any) -> None:
    """A tokenizer can lack characters, and SentencePiece's reads ▁ as a space."""
    chat = chat_of("gemma", "chatml")
    user = [{"role": "user", "content": "a▁b"}]
    assert chat.check_prompt(user) == [r"the tokenizer reads <|im_start|>user\na[-▁-]{+ +}b<|im_end|><|im_star…"]
    assert len(chat.encode(user, "a▁b").changes) == 1
    assert chat_of("qwen", "chatml").encode([{"role": "user", "content": "5 \u2126"}], "e\u0301").changes == ()


def test_reasoning_is_reported_and_turned_off_by_row(chat_of: Any, smollm2: Path) -> None:
    """Arguments of a row replace those of the run, and unknown ones are an error."""
    user = [{"role": "user", "content": "2 + 2?"}]
    chat, quiet = chat_of("gpt2", "qwen3"), Prompt(user, (), {"enable_thinking": False})
    block = "<think>\n\n</think>\n\n"
    assert chat.encode(user, "4").changes == (r"the response is {+<think>\n\n</think>\n\n+}4",)
    encoded = chat.encode(quiet, "4")
    assert (encoded.changes, chat.template.decode(encoded.ids[encoded.start :])) == ((), "4<|im_end|>")
    assert chat.template.decode(encoded.ids[: encoded.start]).endswith("<|im_start|>assistant\n" + block)
    off = FORMS["qwen3"].chat("gpt2", smollm2, kwargs={"enable_thinking": False})
    assert off.prompt(user) == chat.prompt(quiet)
    assert off.prompt(Prompt(user, (), {"enable_thinking": True})) == chat.prompt(user)
    assert chat.encode(user, f"{block}4").changes == ()
    earlier = [*user, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"}, *user]
    written = r"the assistant's message 1 is not as written, '<think>\nhm\n</think>\n\n4'"
    assert chat.check_prompt(earlier) == [written]
    with pytest.raises(ValueError, match="does not read sing"):
        chat.prompt(Prompt(user, (), {"sing": True}))


@pytest.mark.parametrize(
    ("response", "finished", "trained", "change"),
    [
        ("<think>\ntwo and tw", False, "<think>\n\n</think>\n\n<think>\ntwo and tw",
         r"<think>\n{+\n</think>\n\n<think>\n+}two and tw"),
        ("<think>2+2</think>4", True, "<think>\n2+2\n</think>\n\n4<|im_end|>",
         r"<think>[-2+2</think>-]{+\n2+2\n</think>\n\n+}4"),
        ("<think>\n2+2\n</think>\n\n4", True, "<think>\n2+2\n</think>\n\n4<|im_end|>", ""),
    ],
)  # fmt: skip
def test_reasoning_that_the_template_rewrites_is_reported(response, finished, trained, change, chat_of: Any) -> None:
    """A truncated answer gets an empty block before its own, and a block gets line ends."""
    chat = chat_of("gpt2", "qwen3")
    encoded = chat.encode([{"role": "user", "content": "2 + 2?"}], response, finished)
    assert chat.template.decode(encoded.ids[encoded.start :]) == trained
    assert encoded.changes == ((f"the response is {change}",) if change else ())


def test_text_in_arguments_of_a_row_is_inert(smollm2: Path) -> None:
    chat = FORMS["chatml"].chat("added", smollm2)
    chat.tokenizer.chat_template = "{{ persona }}" + CHATML
    found = chat.prompt(Prompt([{"role": "user", "content": "a"}], (), {"persona": "<|im_start|>b<|im_end|>"}))
    assert find_controls(chat, "chatml", found) == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert chat.template.decode(found).startswith("<|im_start|>b<|im_end|><|im_start|>user\na")


def test_template_that_reads_the_clock_gets_the_date_of_the_run(smollm2: Path) -> None:
    dates = [datetime.date(2024, 7, 26), datetime.date(2025, 1, 2)]
    for day, written in zip([*dates, dates[0]], ["26 Jul 2024", "02 Jan 2025", "26 Jul 2024"], strict=True):
        chat = FORMS["llama3"].chat("gpt2", smollm2, today=day)
        assert f"Today is {written}\n" in chat.template.decode(chat.prompt([{"role": "user", "content": "a"}]))


@pytest.mark.parametrize("name", ["phi", "r1", "mistral"])
def test_tokens_of_a_system_and_a_tool_turn_are_control_tokens(name: str, chat_of: Any) -> None:
    """Also if they are not special tokens. Tokens within a tool's turn are in data as text, and stay tokens."""
    found = chat_of("added", name).template.control_tokens
    known = {*FORMS[name].controls, *FORMS[name].plain}
    assert {token for token in known if found.fullmatch(token)} == {*FORMS[name].controls} - {*FORMS[name].inside}


def test_control_token_within_a_control_token_is_inert(smollm2: Path) -> None:
    chat = FORMS["chatml"].chat("gpt2", smollm2)
    chat.tokenizer.add_special_tokens({"additional_special_tokens": ["<<|im_end|>>", "\n"]})
    encoded = chat.encode([{"role": "user", "content": "a\n\n<<|im_end|>>"}], "b")
    assert find_controls(chat, "chatml", encoded.ids) == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]
    assert chat.template.decode(encoded.ids[: encoded.start]).startswith(
        "<|im_start|>user\na\n\n<<|im_end|>><|im_end|>"
    )


def test_control_token_of_one_character_in_text_is_an_error(smollm2: Path) -> None:
    chat = FORMS["chatml"].chat("gpt2", smollm2)
    chat.tokenizer.add_special_tokens({"additional_special_tokens": ["§"]})
    with pytest.raises(ValueError, match="contains the control token '§'"):
        chat.prompt([{"role": "user", "content": "§ 1"}])
    with pytest.raises(ValueError, match=r"noncharacter U\+FDD0"):
        chat.prompt([{"role": "user", "content": f"a{MARK}"}])
