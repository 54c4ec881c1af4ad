"""Messages: the turns of a prompt, with everything that a chat template can read of them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Keys "role" and "content", and others that templates read: tool_calls, name, tool_call_id, reasoning_content. The
# content may be None or missing if a message has tool calls.
Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
ANSWERING = ("model", "bot", "gpt", "chatgpt", "ai")  # names that some data sets give the assistant
# Names of roles in ShareGPT's form of a message, {"from": "human", "value": "…"}.
SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool",
}  # fmt: skip


class Prompt(tuple[Message, ...]):
    """The messages of a prompt, with the tools and the template's arguments of its row."""

    tools: Sequence[Mapping[str, Any]]
    """Descriptions of tools in JSON schema, for templates that list them."""
    template_kwargs: Mapping[str, Any]
    """The row's own arguments of the chat template. They take precedence over model.chat_template_kwargs."""

    def __new__(
        cls,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> "Prompt":
        """Build a prompt."""
        prompt = super().__new__(cls, messages)
        prompt.tools, prompt.template_kwargs = tuple(tools), dict(template_kwargs or {})
        return prompt

    def __eq__(self, other: object) -> bool:
        """Compare messages, tools and arguments."""
        return isinstance(other, tuple) and prompt_content(self) == prompt_content(other)

    def __ne__(self, other: object) -> bool:
        """Compare as `__eq__` does; a tuple's own would compare the messages alone."""
        return not self == other

    __hash__ = None  # type: ignore[assignment]  # its messages are dicts


def prompt_content(prompt: Sequence[Message]) -> Any:
    """Return a prompt as JSON values: its messages, or an object if it has tools or template arguments too."""
    tools, kwargs = getattr(prompt, "tools", ()), getattr(prompt, "template_kwargs", {})
    if not tools and not kwargs:
        return list(prompt)
    return {"messages": list(prompt), "tools": list(tools), "chat_template_kwargs": dict(kwargs)}


def restore_prompt(content: Any) -> Prompt:
    """Return the prompt of `prompt_content`."""
    if isinstance(content, list):
        return Prompt(content)
    return Prompt(content["messages"], content["tools"], content["chat_template_kwargs"])


def last_text(prompt: Sequence[Message]) -> str:
    """Return the text of a prompt's last message."""
    return str(prompt[-1].get("content") or "")


def render_message(message: Message) -> str:
    """Return a message as text, for readers without a chat template: its content, and its tool calls as JSON."""
    calls = [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join(filter(None, [message.get("content"), *calls]))


def texts_in(value: Any) -> Iterator[str]:
    """Yield all texts in a JSON value, without the keys of its objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from texts_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from texts_in(part)


def parse_prompt(value: Any, tools: Any = None, template_kwargs: Any = None, name: str = "prompt") -> Prompt:
    """Return the prompt in a record: a text (one user turn) or a list of messages, with tools and arguments.

    Raise a ValueError for a value of another form, or if the last message is the assistant's.
    """
    if isinstance(value, str):
        messages = [{"role": "user", "content": value}]
    elif isinstance(value, list | tuple) and value:
        messages = [parse_message(message) for message in value]
    else:
        raise ValueError(f"{name!r} must be text or a non-empty list of messages, got {value!r}")
    if (role := messages[-1]["role"]) == "assistant":
        raise ValueError("the prompt ends with an assistant's message; put the answer into 'responses'")
    if role in ANSWERING:
        raise ValueError(f"the last message has the role {role!r}. If it is the answer, its role must be 'assistant'")
    if not isinstance(tools, list | tuple | None) or not all(isinstance(tool, Mapping) for tool in tools or ()):
        raise ValueError(f"'tools' must be a list of objects, each the JSON schema of a tool, got {tools!r}")
    if not isinstance(template_kwargs, Mapping | None):
        raise ValueError(f"'chat_template_kwargs' must be an object, got {template_kwargs!r}")
    kwargs = {key: part for key, part in (template_kwargs or {}).items() if part is not None}
    return Prompt(messages, tools or (), kwargs)


def parse_message(value: Any) -> Message:
    """Return a message with all its keys, except those that are null.

    Content that is a list of text parts becomes one text. Raise a ValueError for other parts, such as images. A message
    in ShareGPT's form gets the usual keys.
    """
    if isinstance(value, Mapping) and "role" not in value and {"from", "value"} <= set(value):
        role, content = SHAREGPT.get(str(value["from"])), value["value"]
        if role is None:
            raise ValueError(f"'from' must be one of {', '.join(SHAREGPT)}, got {value['from']!r}")
        rest = {key: part for key, part in value.items() if key not in ("from", "value")}
        value = {"role": role, "content": content, **rest}
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        raise ValueError(f"a message must have 'role' and 'content', both text, got {value!r}")
    if (role := value["role"]) not in ROLES and role.strip().lower() in ROLES:
        raise ValueError(f"the role {role!r} must be written {role.strip().lower()!r}")
    message = {key: part for key, part in value.items() if part is not None or key == "content"}
    content = message.get("content")
    if isinstance(content, list | tuple):
        message["content"] = "".join(map(_parse_part, content))
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise ValueError(f"a message must have 'role' and 'content', both text, got {value!r}")
    return message


def split_answer(value: Any, name: str) -> tuple[list[Message], str, dict[str, Any]]:
    """Return the messages before an answer, its text, and the further keys of its message, such as tool_calls.

    An answer is a text, an assistant's message, or a list of messages that ends with one. Raise a ValueError otherwise.
    """
    if isinstance(value, str):
        return [], value, {}
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"{name!r} must be text, or messages that end with the assistant's, got {value!r}")
    *before, last = map(parse_message, messages)
    if last["role"] != "assistant":
        raise ValueError(f"{name!r} must end with an assistant's message")
    return before, last.get("content") or "", {k: part for k, part in last.items() if k not in ("role", "content")}


def _parse_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise ValueError(f"content may have parts of type text only, got {part!r}")


def without_padding(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record of an Arrow table without the nulls that Arrow adds to messages and tools.

    All messages of a column have the same keys there, and all arguments of all tools are in every tool call.
    """
    return {
        key: _without_nulls(value) if key == "tools" or _is_conversation(value) else value
        for key, value in record.items()
    }


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) and "role" in item for item in value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None or key == "content"}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
