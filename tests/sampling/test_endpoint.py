"""What an OpenAI-compatible server returns and is sent: tokens, prompts, reasoning, tool calls, ends.

The rest of the sampler is in test_samplers.py, and a real server is in test_serve.py.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from notebooks.tiny import TEMPLATE, byte_tokenizer
from tests.helpers.models import pretrained, saved
from tests.helpers.servers import Asked, client, completion, served
from var.data.messages import Prompt
from var.models.frozen import FrozenModel
from var.sampling.base import Sample, Sampling
from var.sampling.endpoint import Endpoint
from var.utils.errors import UserError

SAMPLING = Sampling(responses=1, temperature=1.0, top_p=0.9, max_new_tokens=8, batch=6, batch_tokens=4096, seed=0)
PROMPTS = [Prompt([{"role": "user", "content": text}]) for text in ("ab", "a longer one", "c")]
BOS, END, USER, ASSISTANT = (
    byte_tokenizer().convert_tokens_to_ids(t) for t in ("<bos>", "<end>", "<user>", "<assistant>")
)
H, I = byte_tokenizer()("hi")["input_ids"]  # noqa: E741


@pytest.fixture
def reference(tiny_folder: Path, tmp_path: Path) -> FrozenModel:
    return FrozenModel(pretrained(tiny_folder, tmp_path), "cpu")


def endpoint(server: Asked, folder: Path, **options: Any) -> Endpoint:
    return Endpoint(client=client(server.base_url, folder, model="tiny"), **options)


def draw(reference: FrozenModel, folder: Path, reply: Any, prompts: Any = PROMPTS[:1], **options: Any) -> list[Sample]:
    """Return the first response to each prompt from a server that gives one reply."""
    with served(lambda body, before: reply) as server:
        return [several[0] for several in endpoint(server, folder, **options)(reference, prompts, SAMPLING)]


def message(reply: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Return a completion with further fields of its message."""
    reply["choices"][0]["message"] |= fields
    return reply


@pytest.mark.parametrize(
    ("ids", "finish", "expected"),
    [
        ([H, I, END], "stop", ("hi", True, (H, I, END))),
        ([H, I], "stop", ("hi", True, (H, I, END))),  # some servers drop the end token
        ([H, I], "length", ("hi", False, (H, I))),
        ([H, I, END], "length", ("hi", True, (H, I, END))),  # it ended with the last token that was allowed
        ([H, I, END], "tool_calls", ("hi", True, (H, I, END))),
        ([], "stop", ("", True, (END,))),
        ([H, USER, END], "stop", ("h<user>", True, (H, USER, END))),
    ],
)
def test_tokens_of_a_reply_are_kept(reference, tmp_path, ids: list[int], finish: str, expected: Any):
    reply = completion("the server's text", finish=finish, token_ids=ids)
    assert draw(reference, tmp_path, reply) == [Sample(*expected)]


def test_text_without_tokens_is_finished_if_the_server_says_so(reference, tmp_path):
    assert draw(reference, tmp_path / "a", completion("hi")) == [Sample("hi", True)]
    assert draw(reference, tmp_path / "b", completion("hi", finish="length")) == [Sample("hi", False)]
    for reason in ("abort", "content_filter", None):
        with pytest.raises(UserError, match=f"finish_reason={reason!r} does not say"):
            draw(reference, tmp_path / "c", completion("hi", finish=reason))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"token_ids": [H, "<end>"]}, "token_ids is not a list of integers"), ({"token_ids": 3}, "token_ids is not"),
        ({"prompt_token_ids": [H, {}]}, "prompt_token_ids is not"),
        ({"prompt_token_ids": "ids"}, "prompt_token_ids is"), ({"message": 7}, "no text in"),
        ({"message": {"content": 7, "reasoning": "x"}}, "no text in the reply"),
    ],
)  # fmt: skip
def test_reply_with_parts_of_other_types_is_an_error(reference, tmp_path, fields: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        draw(reference, tmp_path, completion("hi", **fields))


def test_tokens_of_another_tokenizer_are_an_error(reference, tmp_path):
    with pytest.raises(UserError, match="not those of the tokenizer"):
        draw(reference, tmp_path, completion("hi", token_ids=[H, 100_000]))


@pytest.mark.parametrize("place", ["choice", "reply"])
def test_another_prompt_at_the_server_is_an_error_at_the_first_reply(reference, tmp_path, place: str):
    """The reply is not cached, so that the same command succeeds once the server has the right template."""
    own = {prompt[0]["content"]: reference.pretrained.chat.prompt(prompt) for prompt in PROMPTS}
    shift = True

    def reply(body: dict[str, Any], before: int) -> Any:
        ids = {"prompt_token_ids": own[body["messages"][0]["content"]][shift:]}
        found = completion("hi", token_ids=[H, I, END], **(ids if place == "choice" else {}))
        return found | (ids if place == "reply" else {})

    with served(reply) as server:
        sampler = replace(endpoint(server, tmp_path), client=client(server.base_url, tmp_path, concurrency=1))
        with pytest.raises(UserError) as error:
            sampler(reference, PROMPTS, SAMPLING)
        assert "'<user>ab<end><assistant>' and '<bos><user>ab<end><assistant>'" in str(error.value)
        assert "5 tokens and model= as 6" in str(error.value)
        assert len(server.bodies) == 1
        shift = False
        assert sampler(reference, PROMPTS, SAMPLING) == [[Sample("hi", True, (H, I, END))]] * 3


def test_control_tokens_in_a_prompt_that_the_server_reads_as_such_are_an_error(reference, tmp_path):
    prompt = Prompt([{"role": "user", "content": "a<end>"}])
    read = reference.pretrained.chat.tokenizer(
        "<bos><user>a<end><end><assistant>", add_special_tokens=False
    )["input_ids"]  # fmt: skip
    with pytest.raises(UserError, match="it contains control tokens"):
        draw(reference, tmp_path, completion("hi", token_ids=[H], prompt_token_ids=read), [prompt])


def test_cached_reply_to_a_prompt_of_another_template_is_an_error(reference, tmp_path):
    reply = completion("hi", token_ids=[H], prompt_token_ids=reference.pretrained.chat.prompt(PROMPTS[0]))
    other = FrozenModel(pretrained(reference.pretrained.path, tmp_path, chat_template="plain"), "cpu")
    with served(lambda body, before: reply) as server:
        endpoint(server, tmp_path)(reference, PROMPTS[:1], SAMPLING)
        with pytest.raises(UserError, match=r"set sampler\.version to a new value"):
            endpoint(server, tmp_path)(other, PROMPTS[:1], SAMPLING)
    assert len(server.bodies) == 1


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "tool_calls"])
def test_text_without_what_a_parser_took_out_is_an_error_at_the_first_reply(reference, tmp_path, name: str):
    value = [{"function": {"name": "add"}}] if name == "tool_calls" else "so it is"
    text = None if name == "tool_calls" else "4"
    with served(lambda body, before: message(completion(text), **{name: value})) as server:
        sampler = replace(endpoint(server, tmp_path), client=client(server.base_url, tmp_path, concurrency=1))
        with pytest.raises(UserError, match=f"into {name}, so the answer would train without it.*docs/sampling.md"):
            sampler(reference, PROMPTS, SAMPLING)
        assert len(server.bodies) == 1
    with_tokens = message(completion(None, token_ids=[H, I, END]), **{name: value})
    assert draw(reference, tmp_path / "ids", with_tokens) == [Sample("hi", True, (H, I, END))]


def test_reasoning_that_the_text_has_too_or_that_is_empty_is_accepted(reference, tmp_path):
    text = "<think>so it is</think>4"
    reply = message(completion(text), reasoning_content="so it is\n", reasoning=None, tool_calls=[])
    assert draw(reference, tmp_path, reply) == [Sample(text, True)]


def test_another_number_of_prompt_tokens_is_a_warning(reference, tmp_path, capsys):
    reply = completion("hi")
    reply["usage"]["prompt_tokens"] = 6
    draw(reference, tmp_path / "a", reply)
    assert "Warning" not in capsys.readouterr().out
    reply["usage"]["prompt_tokens"] = 5
    draw(reference, tmp_path / "b", reply)
    assert (
        "in 1 of 1 replies the prompt has another number of tokens than with model= (5 and 6" in capsys.readouterr().out
    )
    reply.pop("usage")
    draw(reference, tmp_path / "c", reply)
    assert "Warning" not in capsys.readouterr().out


def test_tools_and_template_arguments_are_in_the_request(tmp_path):
    """The arguments are those of the model and of the row, which take precedence."""
    template = "{{ tools }}{{ a }}{{ b }}" + TEMPLATE
    folder = saved(tmp_path / "tools", tokenizer=byte_tokenizer(template))
    reference = FrozenModel(pretrained(folder, tmp_path, chat_template_kwargs={"a": 1, "b": 2}), "cpu")
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    prompts = [Prompt(PROMPTS[0], [tool], {"b": 3}), PROMPTS[1]]
    with served(lambda body, before: completion("hi")) as server:
        sampler = replace(endpoint(server, tmp_path), client=client(server.base_url, tmp_path, concurrency=1))
        sampler(reference, prompts, SAMPLING)
    first, second = server.bodies
    assert first["messages"] == [{"role": "user", "content": "ab"}]
    assert (first["tools"], first["chat_template_kwargs"]) == ([tool], {"a": 1, "b": 3})
    assert "tools" not in second
    assert second["chat_template_kwargs"] == {"a": 1, "b": 2}
    fingerprints = [sampler.fingerprint(reference)]  # so cached responses are not those of other arguments
    for kwargs in ({"a": 2, "b": 2}, {}):
        other = FrozenModel(pretrained(folder, tmp_path, chat_template_kwargs=kwargs), "cpu")
        fingerprints.append(sampler.fingerprint(other))
    assert all(a != b for i, a in enumerate(fingerprints) for b in fingerprints[:i])


def test_generation_config_is_sent_as_json_text(reference, tmp_path):
    for config in ({"do_sample": True, "top_k": 0}, '{"do_sample": true, "top_k": 0}'):
        with served(lambda body, before: completion("hi")) as server:
            endpoint(server, tmp_path, request={"generation_config": config})(reference, PROMPTS[:1], SAMPLING)
        assert server.bodies[0]["generation_config"] == '{"do_sample": true, "top_k": 0}'
