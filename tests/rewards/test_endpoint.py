"""Reward models behind HTTP, against a real server that speaks each protocol."""

import math
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate

from notebooks.tiny import TEMPLATE
from tests.helpers.models import set_clock
from tests.helpers.runs import composed
from tests.helpers.servers import Broken, client, served
from var.config.check import check
from var.rewards.endpoint import Endpoint
from var.utils.errors import UserError
from var.utils.http_client import Client

ASK = ({"role": "user", "content": "ab"},)
TALK = (
    {"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"},
    {"role": "user", "content": "v"},
)  # fmt: skip


def make_reward(url: str, folder: Path, protocol: Any = "classify", **options: Any) -> Endpoint:
    return Endpoint(client=client(url, folder, model="rm"), protocol=protocol, **options)


def score_length(body: dict[str, Any], before: int) -> Any:
    """Score a response by its length, in the protocol of the request."""
    if "query" in body:
        return {"rewards": [float(len(body["query"][0]))]}
    score = [float(len(body["messages"][-1]["content"]))]
    return {"data": [{"index": 0, "data": score, "probs": score, "num_classes": 1}]}


def score(reward: Endpoint, *texts: str) -> list[float]:
    return reward([ASK] * len(texts), texts, [None] * len(texts))


@pytest.mark.parametrize(("protocol", "path"), [("pooling", "/pooling"), ("classify", "/classify")])
def test_vllm_receives_messages_and_returns_the_raw_score(protocol: str, path: str, tmp_path: Path):
    with served(score_length) as server:
        reward = make_reward(server.base_url, tmp_path, protocol, request={"priority": 1})
        assert reward([ASK, TALK], ["xyz", "w"], [None, "7"]) == [3.0, 1.0]
    assert server.paths == [f"/v1{path}"] * 2
    first = next(body for body in server.bodies if len(body["messages"]) == 2)
    assert first == {
        "model": "rm", "messages": [*ASK, {"role": "assistant", "content": "xyz"}], "use_activation": False,
        "priority": 1,
    }  # fmt: skip


def test_query_protocol_is_openrlhfs(tmp_path: Path):
    """`query` is prompt and response and begins with `prompts`. `labels` is the row's answer."""
    with served(score_length) as server:
        assert make_reward(server.base_url, tmp_path, "query")([TALK], ["w"], ["7"]) == [
            float(len("s\n\nu\n\na\n\nv\n\nw"))
        ]
        make_reward(server.base_url, tmp_path, "query", chat_template=TEMPLATE)([ASK], ["xy"], [None])
    assert server.paths == ["/v1"] * 2
    plain, rendered = server.bodies
    assert plain == {
        "model": "rm", "query": ["s\n\nu\n\na\n\nv\n\nw"], "prompts": ["s\n\nu\n\na\n\nv\n\n"], "labels": ["7"]
    }  # fmt: skip
    assert rendered["query"] == ["<user>ab<end><assistant>xy<end>"]
    assert rendered["prompts"] == ["<user>ab<end><assistant>"]
    assert rendered["labels"] == [""]


def test_score_does_not_depend_on_batch_or_order(tmp_path: Path):
    texts = ["x" * i for i in range(1, 20)]
    with served(score_length) as server:
        together = score(make_reward(server.base_url, tmp_path / "a"), *texts)
        backwards = score(make_reward(server.base_url, tmp_path / "b"), *texts[::-1])
    assert together == backwards[::-1] == [float(i) for i in range(1, 20)]
    assert len(server.bodies) == 2 * len(texts)


@pytest.mark.parametrize(
    ("protocol", "reply"),
    [
        ("query", {"rewards": [-1.5]}), ("query", {"rewards": -1.5}), ("query", {"rewards": [[-1.5]]}),
        ("pooling", {"data": [{"data": [-1.5]}]}), ("pooling", {"data": [{"data": [[-1.5]]}]}),
        ("classify", {"data": [{"probs": [-1.5]}]}),
    ],
)  # fmt: skip
def test_number_is_read_at_any_nesting(protocol: str, reply: Any, tmp_path: Path):
    with served(lambda body, before: reply) as server:
        assert score(make_reward(server.base_url, tmp_path, protocol), "x") == [-1.5]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0.75", 0.75),
        ("Rating: 8", 8.0),
        ("<think>9?</think>\nI rate it **7.5**", 7.5),
        ("9?</think> -1", -1.0),
    ],
)
def test_rating_in_a_text_follows_the_reasoning(text: str, number: float, tmp_path: Path):
    """A server of the query protocol may pass on what a language model wrote."""
    with served(lambda body, before: {"rewards": [text]}) as server:
        assert score(make_reward(server.base_url, tmp_path, "query"), "x") == [number]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<think>9?", "reasoning without an end in the reply"),
        ("good", "a text without a number"),
        ("7-8", "a text without"),
    ],
)
def test_text_without_a_rating_is_an_error(text: str, words: str, tmp_path: Path):
    with served(lambda body, before: {"rewards": [text]}) as server, pytest.raises(UserError, match=words):
        score(make_reward(server.base_url, tmp_path, "query"), "x")


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ({"data": [{"probs": [0.25, 0.75]}]}, "2 numbers instead of one in the reply"),
        ({"data": [{"probs": []}]}, "0 numbers instead of one"),
        ({"data": [{"probs": [math.nan]}]}, "a score that is not finite in the reply"),
        ({"data": [{"probs": [-math.inf]}]}, "a score that is not finite"),
        ({"data": [{"probs": [10**400]}]}, "no score in the reply"),
        ({"data": [{"probs": ["1"]}]}, "no score in the reply"), ({"data": [{"probs": [True]}]}, "no score"),
        ({"data": [{"probs": [None]}]}, "no score"), ({"data": []}, "no score in the reply {'data': []}"),
        ({"data": [{"data": [1.0]}]}, "no score"), ({"rewards": [1.0]}, "no score"), ({"data": "x"}, "no score"),
    ],
)  # fmt: skip
def test_invalid_score_is_an_error_and_requested_again(reply: Any, words: str, tmp_path: Path):
    with served(lambda body, before: reply if before == 0 else score_length(body, before)) as server:
        with pytest.raises(UserError, match=re.escape(words)):
            score(make_reward(server.base_url, tmp_path), "xyz")
        assert len(server.bodies) == 1
        assert score(make_reward(server.base_url, tmp_path), "xyz") == [3.0]


def test_missing_scores_are_listed_and_others_cached(tmp_path: Path):
    down = True

    def reply(body: dict[str, Any], before: int) -> Any:
        return Broken(500) if down and body["messages"][-1]["content"] in ("bb", "dddd") else score_length(body, before)

    texts = ["a", "bb", "ccc", "dddd", "eeeee"]
    with served(reply) as server:
        with pytest.raises(UserError) as error:
            score(make_reward(server.base_url, tmp_path), *texts)
        assert str(error.value) == (
            f"{server.base_url}: responses without a score (2):\n"
            "  response 'bb': 500: Error code: 500\n"
            "  response 'dddd': 500: Error code: 500\n"
            "3 of 5 scores are cached; the same command requests only the others."
        )
        down, before = False, len(server.bodies)
        assert score(make_reward(server.base_url, tmp_path), *texts) == [1.0, 2.0, 3.0, 4.0, 5.0]
        assert len(server.bodies) - before == 2


def test_fingerprint_depends_on_server_model_and_settings(tmp_path: Path):
    url = "http://127.0.0.1:9"
    variants = [
        make_reward(url, tmp_path), make_reward("http://127.0.0.1:8", tmp_path), make_reward(url, tmp_path, "pooling"),
        make_reward(url, tmp_path, version="2"), make_reward(url, tmp_path, request={"use_activation": True}),
        make_reward(url, tmp_path, "query"), make_reward(url, tmp_path, "query", chat_template=TEMPLATE),
    ]  # fmt: skip
    fingerprints = [reward.fingerprint for reward in variants]
    assert all(fingerprints[i] != fingerprints[j] for i in range(len(variants)) for j in range(i))
    assert make_reward(url, tmp_path / "other").fingerprint == fingerprints[0]
    assert all(reward.scores_text for reward in variants)
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    from_file = make_reward(url, tmp_path, "query", chat_template=str(tmp_path / "chat.jinja"))
    assert from_file.fingerprint == variants[-1].fingerprint  # it is the file's content
    assert from_file._make_body(ASK, "xy", None)["prompts"] == ["<user>ab<end><assistant>"]


def test_template_reads_the_date_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    set_clock(monkeypatch, date(2026, 11, 30))
    template = "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}"
    rewards = [
        make_reward("http://127.0.0.1:1", tmp_path, "query", chat_template=template, date=day)
        for day in (None, "2026-11-29")
    ]
    texts = [reward._make_body([{"role": "user", "content": "a"}], "b", None)["prompts"] for reward in rewards]
    assert texts == [["30 Nov 2026: a"], ["29 Nov 2026: a"]]
    assert [reward.fingerprint["date"] for reward in rewards] == ["2026-11-30", "2026-11-29"]


def test_another_version_is_requested_again(tmp_path: Path):
    with served(score_length) as server:
        score(make_reward(server.base_url, tmp_path), "x")
        score(make_reward(server.base_url, tmp_path, version="2"), "x")
        assert server.bodies[0] == server.bodies[1]
        score(make_reward(server.base_url, tmp_path, version="2"), "x")
    assert len(server.bodies) == 2


def test_fingerprint_checks_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RM_KEY", raising=False)
    reward = Endpoint(client=client("http://127.0.0.1:9", tmp_path, api_key_env="RM_KEY"), protocol="classify")
    with pytest.raises(UserError, match="RM_KEY is not set"):
        reward.fingerprint  # noqa: B018


def test_invalid_settings_are_errors(tmp_path: Path):
    with pytest.raises(UserError, match="expected query, pooling or classify, got score"):
        make_reward("http://127.0.0.1:9", tmp_path, "score")
    with pytest.raises(UserError, match=r"chat_template: has no effect with protocol=pooling"):
        make_reward("http://127.0.0.1:9", tmp_path, "pooling", chat_template=TEMPLATE)


def test_yaml_states_every_setting(tmp_path: Path):
    cfg = composed(
        "+model.date=null", f"+cache={tmp_path}", "reward.client.base_url=http://127.0.0.1:9", root="reward/endpoint"
    )
    check(cfg, {})
    reward = instantiate(cfg.reward)
    assert reward == Endpoint(client=reward.client, protocol="classify")
    assert type(reward.request) is dict
    stated = set(cfg.reward) - {"_target_", "_convert_"}
    assert stated == set(Endpoint.__dataclass_fields__)
    assert set(cfg.reward.client) - {"_target_"} == set(Client.__dataclass_fields__) - {"usage"}
