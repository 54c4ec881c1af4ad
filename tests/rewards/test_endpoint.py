"""Reward models behind HTTP, by a real server that scores as each protocol does: never a response without a score."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate

from notebooks.tiny import TEMPLATE
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


def reward(url: str, folder: Path, protocol: Any = "classify", **options: Any) -> Endpoint:
    return Endpoint(client=client(url, folder, model="rm"), protocol=protocol, **options)


def length(body: dict[str, Any], before: int) -> Any:
    """A reward model that scores a response by its length, in the form of whichever protocol asks."""
    if "query" in body:
        return {"rewards": [float(len(body["query"][0]))]}
    score = [float(len(body["messages"][-1]["content"]))]
    return {"data": [{"index": 0, "data": score, "probs": score, "num_classes": 1}]}


def scored(one: Endpoint, *texts: str) -> list[float]:
    return one([ASK] * len(texts), texts, [None] * len(texts))


@pytest.mark.parametrize(("protocol", "path"), [("pooling", "/pooling"), ("classify", "/classify")])
def test_vllm_gets_the_conversation_and_gives_the_raw_score(protocol: str, path: str, tmp_path: Path):
    with served(length) as server:
        one = reward(server.base_url, tmp_path, protocol, request={"priority": 1})
        assert one([ASK, TALK], ["xyz", "w"], [None, "7"]) == [3.0, 1.0]
    assert server.paths == [f"/v1{path}"] * 2
    first = next(body for body in server.bodies if len(body["messages"]) == 2)
    assert first == {
        "model": "rm", "messages": [*ASK, {"role": "assistant", "content": "xyz"}], "use_activation": False,
        "priority": 1,
    }  # fmt: skip


def test_query_is_openrlhfs_form(tmp_path: Path):
    """One text a list: prompt and response in `query`, which begins with `prompts`; the row's answer in `labels`."""
    with served(length) as server:
        assert reward(server.base_url, tmp_path, "query")([TALK], ["w"], ["7"]) == [float(len("s\n\nu\n\na\n\nv\n\nw"))]
        reward(server.base_url, tmp_path, "query", chat_template=TEMPLATE)([ASK], ["xy"], [None])
    assert server.paths == ["/v1"] * 2
    plain, rendered = server.bodies
    assert plain == {
        "model": "rm", "query": ["s\n\nu\n\na\n\nv\n\nw"], "prompts": ["s\n\nu\n\na\n\nv\n\n"], "labels": ["7"]
    }  # fmt: skip
    assert rendered["query"] == ["<user>ab<end><assistant>xy<end>"]
    assert rendered["prompts"] == ["<user>ab<end><assistant>"]
    assert rendered["labels"] == [""]


def test_a_score_does_not_depend_on_its_batch_or_order(tmp_path: Path):
    texts = ["x" * i for i in range(1, 20)]
    with served(length) as server:
        together = scored(reward(server.base_url, tmp_path / "a"), *texts)
        backwards = scored(reward(server.base_url, tmp_path / "b"), *texts[::-1])
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
def test_one_number_is_read_however_it_is_nested(protocol: str, reply: Any, tmp_path: Path):
    with served(lambda body, before: reply) as server:
        assert scored(reward(server.base_url, tmp_path, protocol), "x") == [-1.5]


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ({"data": [{"probs": [0.25, 0.75]}]}, "2 numbers where a reward model has one in the reply"),
        ({"data": [{"probs": []}]}, "0 numbers where a reward model has one"),
        ({"data": [{"probs": [math.nan]}]}, "a score that is not finite in the reply"),
        ({"data": [{"probs": [-math.inf]}]}, "a score that is not finite"),
        ({"data": [{"probs": ["1"]}]}, "no score in the reply"), ({"data": [{"probs": [True]}]}, "no score"),
        ({"data": [{"probs": [None]}]}, "no score"), ({"data": []}, "no score in the reply {'data': []}"),
        ({"data": [{"data": [1.0]}]}, "no score"), ({"rewards": [1.0]}, "no score"), ({"data": "x"}, "no score"),
    ],
)  # fmt: skip
def test_a_reply_without_one_finite_number_is_no_score_and_is_asked_again(reply: Any, words: str, tmp_path: Path):
    with served(lambda body, before: reply if before == 0 else length(body, before)) as server:
        with pytest.raises(UserError, match=re.escape(words)):
            scored(reward(server.base_url, tmp_path), "xyz")
        assert len(server.bodies) == 1
        assert scored(reward(server.base_url, tmp_path), "xyz") == [3.0]


def test_what_has_no_score_is_counted_named_and_the_rest_is_kept(tmp_path: Path):
    down = True

    def sick(body: dict[str, Any], before: int) -> Any:
        return Broken(500) if down and body["messages"][-1]["content"] in ("bb", "dddd") else length(body, before)

    texts = ["a", "bb", "ccc", "dddd", "eeeee"]
    with served(sick) as server:
        with pytest.raises(UserError) as error:
            scored(reward(server.base_url, tmp_path), *texts)
        assert str(error.value) == (
            f"{server.base_url} left responses without a score (2):\n"
            "  response 'bb': 500: Error code: 500\n"
            "  response 'dddd': 500: Error code: 500\n"
            "3 of 5 have one, which is kept: the same command asks only for the rest."
        )
        down, before = False, len(server.bodies)
        assert scored(reward(server.base_url, tmp_path), *texts) == [1.0, 2.0, 3.0, 4.0, 5.0]
        assert len(server.bodies) - before == 2


def test_the_identity_tells_server_model_protocol_and_version(tmp_path: Path):
    url = "http://127.0.0.1:9"
    variants = [
        reward(url, tmp_path), reward("http://127.0.0.1:8", tmp_path), reward(url, tmp_path, "pooling"),
        reward(url, tmp_path, version="2"), reward(url, tmp_path, request={"use_activation": True}),
        reward(url, tmp_path, "query"), reward(url, tmp_path, "query", chat_template=TEMPLATE),
    ]  # fmt: skip
    identities = [one.identity for one in variants]
    assert all(identities[i] != identities[j] for i in range(len(variants)) for j in range(i))
    assert reward(url, tmp_path / "other").identity == identities[0]
    assert all(one.scores_text for one in variants)


def test_another_version_is_scored_anew(tmp_path: Path):
    with served(length) as server:
        scored(reward(server.base_url, tmp_path), "x")
        scored(reward(server.base_url, tmp_path, version="2"), "x")
        assert server.bodies[0] == server.bodies[1]
        scored(reward(server.base_url, tmp_path, version="2"), "x")
    assert len(server.bodies) == 2


def test_a_missing_key_is_told_by_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RM_KEY", raising=False)
    one = Endpoint(client=client("http://127.0.0.1:9", tmp_path, api_key_env="RM_KEY"), protocol="classify")
    with pytest.raises(UserError, match="RM_KEY is not set"):
        one.identity  # noqa: B018


def test_settings_that_cannot_be_are_errors(tmp_path: Path):
    with pytest.raises(UserError, match="query, pooling or classify, got score"):
        reward("http://127.0.0.1:9", tmp_path, "score")
    with pytest.raises(UserError, match=r"chat_template is of protocol=query; with protocol=pooling the server"):
        reward("http://127.0.0.1:9", tmp_path, "pooling", chat_template=TEMPLATE)


def test_the_yaml_states_every_setting_and_builds(tmp_path: Path):
    cfg = composed(f"+cache={tmp_path}", "reward.client.base_url=http://127.0.0.1:9", root="reward/endpoint")
    check(cfg, {})
    one = instantiate(cfg.reward)
    assert one == Endpoint(client=one.client, protocol="classify")
    assert type(one.request) is dict
    stated = set(cfg.reward) - {"_target_", "_convert_"}
    assert stated == set(Endpoint.__dataclass_fields__)
    assert set(cfg.reward.client) - {"_target_"} == set(Client.__dataclass_fields__) - {"usage"}
