"""The prompt of a judge: what is filled in, and the files that are read."""

import json

import pytest

from var.evaluate.judges.endpoint import PROMPTS, Template, read_template, render_question
from var.utils.errors import UserError

PROMPT = ({"role": "user", "content": "1 + 2?"},)
TEMPLATE = Template(system=None, user="{question} {answer_a} {answer_b} [[A]]")


def test_texts_are_inserted_unchanged():
    messages = TEMPLATE.fill(PROMPT, r"{answer_b} {0} \1 }{", "{question}")
    assert messages == [{"role": "user", "content": r"1 + 2? {answer_b} {0} \1 }{ {question} [[A]]"}]


def test_conversation_is_shown_with_its_roles():
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    assert render_question([{"role": role, "content": text} for role, text in turns]) == (
        "This is a conversation; the two answers reply to its last message.\n\n"
        "[System]\nBe kind.\n\n[User]\nHi\n\n[Assistant]\nHello\n\n[User]\nBye"
    )


def test_hash_depends_on_the_wording(tmp_path):
    (tmp_path / "t.txt").write_text("{question}{answer_a}{answer_b} [[A]]")
    other = read_template(tmp_path / "t.txt", "[[A]]")
    assert other.hash != TEMPLATE.hash == Template(system=None, user=TEMPLATE.user).hash
    assert Template(system="", user=TEMPLATE.user).hash != TEMPLATE.hash


@pytest.mark.parametrize(
    ("name", "hash"),
    [
        ("mtbench", "2ddcb3d5515fbceb453afd369bb59f12"),
        ("arena_hard_0.1", "34692030ba3b20c5bfb51a2a283826bd"),
        ("alpaca_eval_2", "a0a3282661033817125eae06101ec6ac"),
    ],
)
def test_own_wordings_have_not_changed(name, hash):
    """Another wording gives other win rates, so it needs another version of the judge."""
    assert read_template(PROMPTS / f"{name}.txt", "").hash == hash


@pytest.mark.parametrize(
    ("name", "text", "system"),
    [
        (
            "judge_prompts.jsonl",
            json.dumps({"name": "single-v1", "system_prompt": "no", "prompt_template": "{question}"}) + "\n"
            + json.dumps({"name": "pair-v2", "system_prompt": "judge [[A]]",
                          "prompt_template": "{question}|{answer_a}|{answer_b}"}) + "\n",
            "judge [[A]]",
        ),
        (
            "judge_config.yaml",
            'regex_pattern: \\[\\[([AB<>=]+)\\]\\]\nsystem_prompt: "judge\\n[[A]]"\n'
            'prompt_template: ["{question_1}|{answer_1}|{answer_2}"]\n',
            "judge\n[[A]]",
        ),
        (
            "clf.txt",
            "<|im_start|>system\njudge\nwell [[A]]\n<|im_end|>\n<|im_start|>user\n"
            "{instruction}|{output_1}|{output_2}\n<|im_end|>\n",
            "judge\nwell [[A]]",
        ),
    ],
)  # fmt: skip
def test_files_of_the_benchmarks_are_read(tmp_path, name, text, system):
    """The forms of FastChat, Arena-Hard and AlpacaEval."""
    (tmp_path / name).write_text(text)
    assert read_template(tmp_path / name, "[[A]]").fill(PROMPT, "x", "y") == [
        {"role": "system", "content": system}, {"role": "user", "content": "1 + 2?|x|y"},
    ]  # fmt: skip


def test_error_lists_everything_that_a_template_lacks(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("{question} and {answer_a}")
    with pytest.raises(UserError) as error:
        read_template(path, "[[A]]")
    assert str(error.value) == (
        f"judge.template={path} cannot be used (2):\n"
        "  {answer_b}: does not occur in it\n"
        "  [[A]]: does not occur in it, so the judge would not know how to write its verdict"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [("none.txt", None), ("a.jsonl", '{"name": "other"}'), ("a.jsonl", "{"), ("a.yaml", "prompt_template: x"),
     ("a.yaml", "3"), ("a.jsonl", '{"name": "pair-v2"}'), ("a.jsonl", "[" * 100_000), ("a.yaml", "[" * 100_000),
     ("a.yaml", "a: &a [x]\nb: *a"), ("a.yaml", "\x1b[31m")],
)  # fmt: skip
def test_unreadable_template_is_named(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"judge.template=.*{name} cannot be used"):
        read_template(tmp_path / name, "[[A]]")
