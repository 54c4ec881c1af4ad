"""Find the contents of messages in the text that a template renders."""

import re
from collections.abc import Sequence
from contextlib import suppress

from var.data.messages import Message
from var.data.template import MARK, PROBE, USUAL, Template

# Put around the content of each message, with its index, to find it in the rendered text.
BEGIN, END = "\ufdd1", "\ufdd2"
PLACE = re.compile(f"(?s){BEGIN}([0-9]+){BEGIN}(.*?){END}")
MOST_FRAMES = 1000


class Placement:
    """Finds contents of messages in rendered text."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self._frames: dict[tuple[str, ...], list[str]] = {}

    def place_contents(self, prompt: Sequence[Message], rendered: str) -> list[tuple[int, str]]:
        """Return the contents in a rendered prompt with the indices of their messages, in the order of the text.

        If the text is not what the template usually writes around such contents, the prompt is rendered once more with
        its contents between noncharacters. If it then has another text, the contents are searched for.
        """
        contents = [message.get("content") or "" for message in prompt]
        if self._is_usual(prompt, contents, rendered):
            return list(enumerate(contents))
        around = [{**m, "content": f"{BEGIN}{i}{BEGIN}{contents[i]}{END}"} for i, m in enumerate(prompt)]
        with suppress(ValueError):
            marked = [a if contents[i].strip() else prompt[i] for i, a in enumerate(around)]
            text = self.template.render(marked, prompt, True)
            if BEGIN not in rendered and END not in rendered and _is_same(PLACE.sub(r"\2", text), rendered):
                return [(int(i), part.replace(MARK, "")) for i, part in PLACE.findall(text)]
        text, at, places = rendered.replace(MARK, ""), 0, list[tuple[int, int, str]]()
        for i, content in enumerate(contents):
            content = content.strip()
            if (begin := text.find(content, at)) >= 0 or (begin := text.find(content)) >= 0:
                places.append((begin, i, content))
                at = max(at, begin + len(content))
        return [(i, content) for _, i, content in sorted(places)]

    def _is_usual(self, prompt: Sequence[Message], contents: list[str], rendered: str) -> bool:
        """Return whether a text is the contents in order between the texts that the template writes around others."""
        plain = not getattr(prompt, "tools", ()) and not getattr(prompt, "template_kwargs", {})
        if not plain or MARK in rendered or not all(m.keys() == USUAL and m["content"] for m in prompt):
            return False
        between = self._frame(tuple(message["role"] for message in prompt))
        for written in (contents, [content.strip() for content in contents]):
            if rendered == "".join(part for pair in zip(between, [*written, ""], strict=False) for part in pair):
                return bool(between)
        return False

    def _frame(self, roles: tuple[str, ...]) -> list[str]:
        """Return what the template writes before, between and after the contents of messages with these roles.

        An empty list if it does not write each content once and in order.
        """
        if (found := self._frames.get(roles)) is None:
            if len(self._frames) >= MOST_FRAMES:
                self._frames.clear()
            found = []
            with suppress(ValueError):
                messages = [{"role": role, "content": f"{BEGIN}{i}{BEGIN}{PROBE}{END}"} for i, role in enumerate(roles)]
                parts = PLACE.split(self.template.render(messages, (), True))
                if parts[1::3] == [str(i) for i in range(len(roles))]:
                    found = parts[::3]
            self._frames[roles] = found
        return found

    def find_content(self, messages: Sequence[Message], prompt: Sequence[Message], full: str) -> list[str] | None:
        """Return what the template writes of the last message's content, once for each place.

        None if it writes another text when the content is marked.
        """
        *before, last = messages
        marked = [*before, {**last, "content": f"{BEGIN}0{BEGIN}{last['content']}{END}"}]
        with suppress(ValueError):
            text = self.template.render(marked, prompt)
            if _is_same(PLACE.sub(r"\2", text), full):
                return [part.replace(MARK, "") for _, part in PLACE.findall(text)]
        return None


def _is_same(one: str, other: str) -> bool:
    """Return whether two texts are equal up to white space."""
    return one == other or "".join(one.split()) == "".join(other.split())
