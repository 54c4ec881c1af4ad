"""Judges that ask a language model: their prompt, games, requests, replies and errors."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import yaml

from var.data.messages import Message, prompt_content, render_message
from var.evaluate.judges.base import UNFINISHED, Judgement, Outcome, Pair, explain_errors
from var.utils.completions import find_missing_text, get_text
from var.utils.errors import Problems, UserError, brief
from var.utils.files import replace_surrogates
from var.utils.http_client import Client, Failure, count_items
from var.utils.plain_yaml import check_aliases
from var.utils.provenance import hash_content
from var.utils.reasoning import UnfinishedReasoning, read_answer

PROMPTS = Path(__file__).parent / "prompts"  # our own wordings

# The names of the places: ours first, then those in the files of MT-Bench and Arena-Hard, FastChat, and AlpacaEval.
PLACES = {
    "question": ("question", "question_1", "QUESTION", "instruction"),
    "answer_a": ("answer_a", "answer_1", "ANSWER_A", "output_1"),
    "answer_b": ("answer_b", "answer_2", "ANSWER_B", "output_2"),
}
OWN_NAME = {name: place for place, names in PLACES.items() for name in names}
PLACE = re.compile(r"\{(" + "|".join(OWN_NAME) + r")\}")
TURN = re.compile(r"<\|im_start\|>(system|user)\n(.*?)\n?<\|im_end\|>", re.DOTALL)

Game = dict[str, Any]  # a JSON record; "verdict" is None for a game in error


class UnreadableReply(Exception):
    """A reply without a verdict; its text is the kind of error."""


@dataclass(frozen=True, kw_only=True)
class EndpointJudge:
    """A judge that shows a language model both answers and reads its verdict. Each protocol is a subclass."""

    client: Client
    """The endpoint that is asked."""
    template: str | None = None
    """A file to use in place of our own wording; see `read_template`."""
    request: Mapping[str, Any]
    """Further fields of the chat completion's body; a field that is None is left out."""
    max_errors: float = 0.05
    """The fraction of pairs in error above which there is no win rate."""
    protocol: ClassVar[str]
    """The protocol's name in results, and of its wording in prompts/."""
    example: ClassVar[str]
    """A verdict that a template has to mention."""
    settings: ClassVar[tuple[str, ...]] = ()
    """The protocol's own attributes that verdicts depend on."""
    orders = "both"
    """`both`: a pair is played in both orders; `random`: once, in an order that is drawn by its content."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_errors <= 1:
            raise UserError(f"judge.max_errors: expected a fraction of the pairs (0 to 1), got {self.max_errors}")

    def _read(self, reply: Mapping[str, Any]) -> Any:
        """Return the verdict in a reply, or raise UnreadableReply."""
        raise NotImplementedError

    def _decide(self, games: Sequence[Game]) -> tuple[Outcome, float, list[float] | None]:
        """Return a pair's outcome, score and counts (see Judgement) from its games."""
        raise NotImplementedError

    def _summarize(self, pairs: Sequence[Pair], judgement: Judgement) -> dict[str, Any]:
        """Return the protocol's own facts; the judgement's shared facts are known."""
        raise NotImplementedError

    @cached_property
    def _wording(self) -> "Template":
        """The template, read from its file."""
        return read_template(Path(self.template or PROMPTS / f"{self.protocol}.txt"), self.example)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The settings that verdicts depend on."""
        return {
            "protocol": self.protocol, "version": 2, **self.client.fingerprint, "request": dict(self.request),
            "template": self._wording.hash, **{name: getattr(self, name) for name in self.settings},
        }  # fmt: skip

    def check(self) -> None:
        """Raise a UserError if the template, the package or the key cannot be used."""
        self._wording  # noqa: B018
        self.client.check()

    def describe(self, pairs: Sequence[Pair]) -> str:
        """Return the number of calls and their cost."""
        longest = self.request.get("max_tokens") or self.request.get("max_completion_tokens") or 0
        return self.client.estimate([self._body(*game) for game in self._games(pairs)], tokens_out=longest)

    def __call__(self, pairs: Sequence[Pair], advance: Callable[[int], None]) -> Judgement:
        """Play all games in one batch of requests; advance counts pairs, not games."""
        before = asdict(self.client.usage)
        records = self._play(pairs, count_items(advance, self._games_per_pair))
        decisions = [self._decide(games) for games in self._split_games(records)]
        outcomes = [outcome for outcome, _, _ in decisions]
        counts = [counts for _, _, counts in decisions if counts is not None]
        failures = [record["text"] for record in records if record["error"] == "failed"]
        failures += [f"the reply {record['text'][:80]!r}" for record in records if record["error"] == "no verdict"]
        facts = {
            **self.fingerprint,
            "pairs": len(pairs),
            "games": len(records),
            "errors": dict(Counter(record["error"] for record in records if record["error"] is not None)),
            "first_failure": failures[0] if failures else None,
            "max_errors": self.max_errors,
            "reason": explain_errors(outcomes, self.max_errors),
            "usage": {name: value - before[name] for name, value in asdict(self.client.usage).items()},
        }
        judgement = Judgement(outcomes, np.array([score for _, score, _ in decisions]), records, facts, counts or None)
        facts.update(self._summarize(pairs, judgement))
        return judgement

    @property
    def _games_per_pair(self) -> int:
        """The number of games of each pair."""
        return 2 if self.orders == "both" else 1

    def _split_games(self, games: Sequence[Game]) -> list[Sequence[Game]]:
        """Return the games of each pair."""
        return [games[at : at + self._games_per_pair] for at in range(0, len(games), self._games_per_pair)]

    def _games(self, pairs: Sequence[Pair]) -> list[tuple[Pair, bool]]:
        """Return (pair, whether its answer is shown first) for each game; the games of a pair are adjacent."""
        if self.orders == "both":
            return [(pair, first) for pair in pairs for first in (True, False)]
        contents = [(prompt_content(pair.prompt), pair.answer, pair.opponent) for pair in pairs]
        return [(pair, hash_content(*content)[0] % 2 == 0) for pair, content in zip(pairs, contents, strict=True)]

    def _body(self, pair: Pair, answer_first: bool) -> dict[str, Any]:
        shown = (pair.answer, pair.opponent) if answer_first else (pair.opponent, pair.answer)
        options = {key: value for key, value in self.request.items() if value is not None}
        return {"messages": self._wording.fill(pair.prompt, *shown), **options}

    def _play(self, pairs: Sequence[Pair], advance: Callable[[int], None]) -> list[Game]:
        games = self._games(pairs)
        bodies = [self._body(*game) for game in games]
        replies = self.client.ask(bodies, advance=advance, find_fault=_explain_useless)
        records = []
        for (pair, answer_first), body, reply in zip(games, bodies, replies, strict=True):
            record: Game = {
                "id": pair.id, "subset": pair.subset, "seed": pair.seed,
                "order": "answer first" if answer_first else "opponent first",
                "prompt": hash_content(body["messages"]).hex(),
                "verdict": None, "error": None, "text": None, "usage": None,
            }  # fmt: skip
            if isinstance(reply, Failure):
                record.update(error="failed", text=replace_surrogates(reply.reason))
            else:
                record.update(text=get_text(reply), usage=reply.get("usage"))
                try:
                    record["verdict"] = self._read(reply)
                except UnreadableReply as kind:
                    record["error"] = str(kind)
                except UnfinishedReasoning:
                    record["error"] = UNFINISHED
            records.append(record)
        return records


def _explain_useless(reply: Mapping[str, Any]) -> str | None:
    """Return why a reply is not worth keeping: it has no words of the judge, as the error replies of some gateways."""
    try:
        graded = bool(reply["choices"][0]["logprobs"])
    except (LookupError, TypeError):
        graded = False
    try:
        return None if graded or read_answer(reply) is not None else find_missing_text(reply)
    except UnfinishedReasoning:
        return None  # the same request would end there again


def find_verdict(reply: Mapping[str, Any], pattern: re.Pattern[str]) -> str:
    """Return the verdict in a reply, after its reasoning.

    Raise UnreadableReply if there is none or if there are two different ones, and UnfinishedReasoning if the reply ends
    before its answer.
    """
    text = read_answer(reply)
    if text is None:
        raise UnreadableReply("no text")
    verdicts = set(pattern.findall(text))
    if len(verdicts) > 1:
        raise UnreadableReply("several verdicts")
    if not verdicts:
        raise UnreadableReply("truncated" if reply["choices"][0].get("finish_reason") == "length" else "no verdict")
    return str(verdicts.pop())


@dataclass(frozen=True)
class Template:
    """A judge's prompt."""

    system: str | None
    """The system message, if there is one."""
    user: str
    """The user's message, with {question}, {answer_a} and {answer_b}."""

    @property
    def hash(self) -> str:
        """A hash of the wording, for results."""
        return hash_content(self.system, self.user).hex()

    def fill(self, prompt: Sequence[Message], a: str, b: str) -> list[dict[str, str]]:
        """Return the messages to send. The texts are inserted in one pass, so braces in an answer stay unchanged."""
        values = {"question": render_question(prompt), "answer_a": a, "answer_b": b}
        filled = PLACE.sub(lambda match: values[OWN_NAME[match[1]]], self.user)
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": filled}]


def render_question(prompt: Sequence[Message]) -> str:
    """Return a single message unchanged, and a conversation as a transcript with its roles."""
    if len(prompt) == 1:
        return render_message(prompt[0])
    turns = [f"[{message['role'].capitalize()}]\n{render_message(message)}" for message in prompt]
    return "\n\n".join(["This is a conversation; the two answers reply to its last message.", *turns])


def read_template(path: Path, verdict: str) -> Template:
    """Read a template: FastChat's judge_prompts.jsonl (entry pair-v2), Arena-Hard's judge_config.yaml, or a text.

    A text may mark its system message as AlpacaEval does (<|im_start|>system). `verdict` must occur in the template,
    because the judge has to be asked to write it.
    """
    try:
        template = _parse(path.suffix, path.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, LookupError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"judge.template={path} cannot be used: {type(error).__name__}: {brief(error)}") from error
    problems = Problems(f"judge.template={path} cannot be used")
    places = {OWN_NAME[name] for name in PLACE.findall(template.user)}
    for place in PLACES:
        if place not in places:
            problems.add(f"{{{place}}}", "does not occur in it")
    if verdict not in f"{template.system}\n{template.user}":
        problems.add(verdict, "does not occur in it, so the judge would not know how to write its verdict")
    problems.check()
    return template


def _parse(suffix: str, text: str) -> Template:
    if suffix == ".jsonl":
        entries = [json.loads(line) for line in text.split("\n") if line.strip()]
        entry = {entry["name"]: entry for entry in entries}["pair-v2"]
        return Template(system=entry["system_prompt"], user=entry["prompt_template"])
    if suffix in (".yaml", ".yml"):
        entry = yaml.safe_load(check_aliases(text))
        user = entry["prompt_template"]
        return Template(system=entry["system_prompt"], user=user if isinstance(user, str) else user[0])
    turns = dict(TURN.findall(text))
    return Template(system=turns.get("system"), user=turns.get("user", text))
