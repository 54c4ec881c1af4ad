"""sampler=endpoint with a real server, as a user runs it: `transformers serve` with the packaged SmolLM2 on the CPU."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.cli import check_error, check_run, read_summaries, write_to
from tests.helpers.models import pretrained
from tests.helpers.servers import client, serve_model
from var.data.messages import Prompt
from var.models.frozen import FrozenModel
from var.sampling.base import Samples, Sampling
from var.sampling.endpoint import Endpoint

pytestmark = pytest.mark.long

SAMPLED = {"do_sample": True, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
REQUEST = "sampler.request={generation_config: {do_sample: true, top_k: 0, min_p: 0.0, repetition_penalty: 1.0}}"
SAMPLING = Sampling(responses=2, temperature=1.0, top_p=1.0, max_new_tokens=16, batch=8, batch_tokens=4096, seed=0)
PROMPTS = [Prompt([{"role": "user", "content": f"What is 1{i} + 7?"}]) for i in range(2)]


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the address of `transformers serve`. Skip the tests if its packages are missing."""
    with serve_model(smollm2, tmp_path_factory.mktemp("server") / "log.txt") as url:
        yield url


@pytest.fixture
def command(server: str, smollm2: Path, tmp_path: Path) -> list[str]:
    """Return the overrides of a user who samples from the server, without what makes it sample."""
    return [
        "sampler=endpoint", f"sampler.client.base_url={server}", f"sampler.client.model={smollm2}",
        "sampler.client.timeout=600", "data=arithmetic", "data.limit=6", "data.validation_prompts=0",
        "generate.responses=2", "generate.max_new_tokens=8", "data.micro_batch=2", "data.global_batch=6",
        "trainer.accelerator=cpu", "eval=off", *write_to(tmp_path),
    ]  # fmt: skip


def draw(url: str, smollm2: Path, folder: Path, sampling: Sampling = SAMPLING, concurrency: int = 1) -> Samples:
    """Return samples of PROMPTS, from a client without cached replies."""
    asked = client(url, folder, model=str(smollm2), concurrency=concurrency, timeout=600.0)
    sampler = Endpoint(client=asked, request={"generation_config": SAMPLED})
    return sampler(FrozenModel(pretrained(smollm2, folder), "cpu"), PROMPTS, sampling)


def test_server_that_decodes_greedily_stops_the_command(command: list[str], tmp_path: Path):
    """Without the request fields it repeats its answer at any temperature, and nothing is written or trained."""
    out = tmp_path / "rows.jsonl"
    for name, more in (("sample.py", [f"out={out}"]), ("train.py", ["data.responses=sampled", "loss=sft"])):
        said = check_error("generation_config: {do_sample: true, top_k: 0}", *command, *more, command=name)
        assert "identical for" in said
    assert not out.exists()
    assert not read_summaries(tmp_path / "runs")


def test_sample_and_train_with_the_request_fields(command: list[str], tmp_path: Path):
    """The prompt has as many tokens as the local template writes, BOS included, so no warning is printed."""
    out = tmp_path / "rows.jsonl"
    said = check_run("sample.py", *command, REQUEST, f"out={out}")
    assert "Warning" not in said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 6
    assert sum(len({response["text"] for response in row["responses"]}) == 2 for row in rows) >= 4
    assert all("ids" not in response for row in rows for response in row["responses"])
    check_run("train.py", *command, REQUEST, "data.responses=sampled", "loss=sft")
    (summary,) = read_summaries(tmp_path / "runs").values()
    assert summary["data"]["sampled_as_text"] == summary["data"]["sampled_responses"] == 12


def test_seed_is_honored_one_request_at_a_time(server: str, smollm2: Path, tmp_path: Path):
    first = draw(server, smollm2, tmp_path / "a")
    assert draw(server, smollm2, tmp_path / "b") == first
    assert draw(server, smollm2, tmp_path / "c", replace(SAMPLING, seed=1)) != first
    assert all(one.text != other.text for one, other in first)


def test_temperature_top_p_and_the_limit_are_followed(server: str, smollm2: Path, tmp_path: Path):
    greedy = draw(server, smollm2, tmp_path / "a", replace(SAMPLING, temperature=0.0, responses=1))
    cold = draw(server, smollm2, tmp_path / "b", replace(SAMPLING, temperature=0.01))
    narrow = draw(server, smollm2, tmp_path / "c", replace(SAMPLING, top_p=0.01))
    assert cold == narrow == [several * 2 for several in greedy]
    short = draw(server, smollm2, tmp_path / "d", replace(SAMPLING, max_new_tokens=3))
    assert not any(sample.finished for several in short for sample in several)
    long = draw(server, smollm2, tmp_path / "e", replace(SAMPLING, max_new_tokens=200, temperature=0.7))
    assert any(sample.finished for several in long for sample in several)
