"""The samplers in this process and of an HTTP server, and what all samplers share; vLLM is in test_vllm.py."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from tests.helpers.models import pretrained
from tests.helpers.runs import composed
from tests.helpers.servers import Broken, client, completion, served
from var.config.check import check
from var.models.frozen import FrozenModel
from var.sampling.base import Sample, Sampling
from var.sampling.endpoint import Endpoint
from var.sampling.local import Transformers, sample
from var.utils.errors import UserError

SAMPLING = Sampling(responses=2, temperature=0.7, top_p=0.9, max_new_tokens=8, batch=6, batch_tokens=4096, seed=0)


def ask(*texts: str) -> list[list[Any]]:
    return [[{"role": "user", "content": text}] for text in texts]


PROMPTS = ask("ab", "a longer one", "c")


@pytest.fixture
def reference(tiny_folder: Path, tmp_path: Path) -> FrozenModel:
    return FrozenModel(pretrained(tiny_folder, tmp_path), "cpu")


def test_transformers_samples_in_the_references_precision(reference: FrozenModel):
    """The text is that of `sample`. The reference's autocast applies while it samples."""
    sampler = Transformers()
    sampler.check()
    done: list[int] = []
    texts = sampler(reference, PROMPTS, SAMPLING, done.append)
    assert texts == sample(reference.policy.model, reference.pretrained.chat, PROMPTS, SAMPLING)
    assert sum(done) == 3
    assert sampler.fingerprint(reference) == {"reference": reference.fingerprint, "version": 3}
    half = FrozenModel(reference.pretrained, "cpu", torch.bfloat16)
    seen: list[torch.dtype] = []
    half.policy.model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda module, inputs, out: seen.append(out.dtype)
    )
    sampler(half, PROMPTS, SAMPLING)
    assert set(seen) == {torch.bfloat16}
    sampler.release()
    assert "_loaded" in reference.__dict__


def endpoint(url: str, folder: Path, **options: Any) -> Endpoint:
    return Endpoint(client=client(url, folder, model="tiny"), **options)


def seeded(body: dict[str, Any], before: int) -> Any:
    """Reply with the prompt and the seed; an odd seed is truncated."""
    text = f"{body['messages'][-1]['content']} {body['seed']}"
    return completion(text, finish="length" if body["seed"] % 2 else "stop")


def test_endpoint_gets_one_request_and_seed_per_response(reference: FrozenModel, tmp_path: Path):
    sampling = replace(SAMPLING, responses=4)
    with served(seeded) as server:
        done: list[int] = []
        texts = endpoint(server.base_url, tmp_path / "a")(reference, PROMPTS, sampling, done.append)
        again = endpoint(server.base_url, tmp_path / "b")(reference, PROMPTS[::-1], sampling)
        other = endpoint(server.base_url, tmp_path / "a")(reference, PROMPTS, replace(sampling, seed=1))
    assert sum(done) == 3
    assert texts == again[::-1] != other
    assert [len(responses) for responses in texts] == [4, 4, 4]
    said = [{sample.text.rsplit(" ", 1)[0] for sample in responses} for responses in texts]
    assert said == [{"ab"}, {"a longer one"}, {"c"}]
    seeds = [int(sample.text.rsplit(" ", 1)[1]) for responses in texts for sample in responses]
    assert len(set(seeds)) == 12
    assert all(0 <= seed < 2**31 for seed in seeds)
    ends = [sample.finished for responses in texts for sample in responses]
    assert ends == [seed % 2 == 0 for seed in seeds]
    assert len(set(ends)) == 2
    assert server.bodies[0] == {
        "model": "tiny", "messages": server.bodies[0]["messages"], "temperature": 0.7, "top_p": 0.9, "max_tokens": 8,
        "seed": server.bodies[0]["seed"],
    }  # fmt: skip


def test_request_fields_can_be_added_and_removed(reference: FrozenModel, tmp_path: Path):
    with served(lambda body, before: completion("x")) as server:
        request = {"max_tokens": None, "max_completion_tokens": 8, "top_k": -1}
        endpoint(server.base_url, tmp_path, request=request)(reference, PROMPTS[:1], SAMPLING)
    assert server.bodies[0].keys() == {
        "model", "messages", "temperature", "top_p", "seed", "max_completion_tokens", "top_k"
    }  # fmt: skip


def test_empty_text_is_a_response_and_missing_text_a_failure(reference: FrozenModel, tmp_path: Path):
    with served(lambda body, before: completion("")) as server:
        assert endpoint(server.base_url, tmp_path)(reference, PROMPTS[:1], SAMPLING) == [[Sample("", True)] * 2]
    for reply in (completion(None), {"choices": []}, {"data": 1}):
        with served(lambda body, before, reply=reply: reply) as server, pytest.raises(UserError, match="no text in"):
            endpoint(server.base_url, tmp_path / "none")(reference, PROMPTS[:1], SAMPLING)


def test_missing_responses_are_reported_and_requested_again(reference: FrozenModel, tmp_path: Path):
    down = True

    def fail_long(body: dict[str, Any], before: int) -> Any:
        return Broken(400, "too long") if down and "longer" in str(body) else seeded(body, before)

    with served(fail_long) as server:
        with pytest.raises(UserError) as error:
            endpoint(server.base_url, tmp_path)(reference, PROMPTS, SAMPLING)
        assert str(error.value) == (
            f"{server.base_url}: missing responses (2):\n"
            "  prompt 'a longer one': 400: too long\n"
            "  prompt 'a longer one': 400: too long\n"
            "4 of 6 responses were received and cached. Run the same command to request only the missing ones."
        )
        down, before = False, len(server.bodies)
        texts = endpoint(server.base_url, tmp_path)(reference, PROMPTS, SAMPLING)
        assert len(server.bodies) - before == 2
    assert [responses[0].text.split(" ")[0] for responses in texts] == ["ab", "a", "c"]


def test_endpoints_fingerprint_is_address_model_request_and_version(reference: FrozenModel, tmp_path: Path):
    """Another version is sampled again."""
    fingerprint = endpoint("http://127.0.0.1:9/v1", tmp_path).fingerprint(reference)
    assert fingerprint == {"base_url": "http://127.0.0.1:9/v1", "model": "tiny", "request": {}, "version": ""}
    assert endpoint("http://127.0.0.1:9/v1", tmp_path, request={"top_k": 1}).fingerprint(reference) != fingerprint
    with served(seeded) as server:
        first, second = endpoint(server.base_url, tmp_path), endpoint(server.base_url, tmp_path, version="2")
        assert first.fingerprint(reference) != second.fingerprint(reference)
        for sampler in (first, second, second):
            sampler(reference, PROMPTS[:1], SAMPLING)
    assert len(server.bodies) == 4


def test_missing_key_raises_before_any_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(UserError, match="SOME_KEY is not set"):
        Endpoint(client=client("http://127.0.0.1:9/v1", tmp_path, api_key_env="SOME_KEY")).check()


@pytest.mark.parametrize("name", ["transformers", "vllm", "endpoint"])
def test_sampler_configs_list_all_settings_with_their_defaults(name: str, tmp_path: Path):
    values = ["sampler.client.base_url=http://127.0.0.1:9/v1", "sampler.client.model=x"] if name == "endpoint" else []
    cfg = composed(f"+cache={tmp_path}", *values, root=f"sampler/{name}")
    check(cfg, {})
    sampler = instantiate(cfg.sampler)
    listed = {key for key in cfg.sampler if key not in ("_target_", "_convert_")}
    assert listed == {one.name for one in fields(sampler) if one.init}
    assert sampler == type(sampler)(**({"client": sampler.client} if name == "endpoint" else {}))
