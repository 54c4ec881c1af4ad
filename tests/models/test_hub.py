"""Models, reward models and data sets from a hub: what is downloaded, broken downloads, and error messages."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.hub_server import TOKEN, Hub, client_environment, serve_hub, write_repositories
from tests.helpers.models import pretrained
from var.models.files import has_weights

# Runs each line of standard input with these names, and prints its result or UserError as a line of JSON.
CLIENT = """
import huggingface_hub, json, sys
from pathlib import Path
from tests.helpers.models import pretrained
from var.data.read import read
from var.data.sources.offsetbias import OffsetBias
from var.data.sources.preferences import Preferences
from var.rewards.classifier import Classifier
from var.utils.console import silence_libraries
from var.utils.errors import UserError
silence_libraries()
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 256  # bytes; a break loses what is received of a chunk of 10 MiB
cache = Path(sys.argv[1])
def model(path, **more): return pretrained(path, cache, **{"architecture": None, **more})
def count(files): return sum(p.numel() for p in files.parameters())
def reward(path): return Classifier(path=path, cache=str(cache))
for line in sys.stdin.read().splitlines():
    try: print("RESULT", json.dumps(eval(line)))
    except UserError as error: print("RESULT", json.dumps(f"ERROR {error}"))
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_repositories(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def hub(repositories: Any) -> Iterator[Hub]:
    models, sets = repositories
    with serve_hub(models=models, datasets=sets) as server:
        yield server


def ask(hub: Hub, home: Path, *lines: str, **environment: str) -> list[Any]:
    """Evaluate expressions in a new process that uses the hub; return their values or errors."""
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, str(home / "cache")], input="\n".join(lines), capture_output=True, text=True,
        env=client_environment(hub, home, **environment), timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT")]


@pytest.mark.long
def test_sizes_and_cache_keys_need_no_weights(hub: Hub, repositories: Any, tmp_path: Path) -> None:
    """The hub lists the checksums of large files, from which the hash of the weights is made."""
    folder = repositories[0]["Qwen/Qwen2.5-7B"].folder
    sizes, fingerprint, score = ask(
        hub, tmp_path, "count(model('Qwen/Qwen2.5-7B').build_meta())", "model('Qwen/Qwen2.5-7B').fingerprint",
        "reward('NCSOFT/Llama-3-OffsetBias-RM-8B').fingerprint",
    )  # fmt: skip
    local = pretrained(folder, tmp_path)
    assert sizes == sum(p.numel() for p in local.load().parameters())
    assert fingerprint == local.fingerprint
    assert score["weights"] == pretrained(folder.with_name("rm"), tmp_path).weights
    assert hub.downloads(".safetensors") == []
    assert set(hub.downloads("config.json")) == {
        f"{name}/{file}" for name in ("Qwen/Qwen2.5-7B", "NCSOFT/Llama-3-OffsetBias-RM-8B")
        for file in ("config.json", "tokenizer_config.json", "generation_config.json")
        if (folder.with_name("qwen" if "Qwen" in name else "rm") / file).exists()
    }  # fmt: skip


def test_sizes_need_only_config_json(hub: Hub, tmp_path: Path) -> None:
    (sizes,) = ask(hub, tmp_path, "count(model('gated/llama').build_meta())", HF_TOKEN=TOKEN)
    assert sizes > 1000
    assert hub.downloads() == ["gated/llama/config.json"]


@pytest.mark.long
def test_broken_download_continues_where_it_broke(hub: Hub, repositories: Any, tmp_path: Path) -> None:
    file = repositories[0]["Qwen/Qwen2.5-7B"].folder / "model.safetensors"
    hub.breaks = {"model.safetensors": 1024}
    (number,) = ask(hub, tmp_path, "count(model('Qwen/Qwen2.5-7B').load())")
    assert number > 1000
    assert hub.requests["GET Qwen/Qwen2.5-7B/model.safetensors"] == 2
    assert hub.sent["Qwen/Qwen2.5-7B/model.safetensors"] == file.stat().st_size


@pytest.mark.long
def test_failed_download_raises_and_completes_later(hub: Hub, repositories: Any, tmp_path: Path) -> None:
    """A truncated file is never read as a model. The second command downloads only the file that is missing."""
    hub.breaks, hub.keeps_breaking = {"model.safetensors": 1000}, True
    (error,) = ask(hub, tmp_path, "count(model('Qwen/Qwen2.5-7B').load())")
    assert error.startswith("ERROR model.path=Qwen/Qwen2.5-7B: not on this machine, and it could not be downloaded")
    hub.breaks.clear()
    hub.forget()
    number, weights = ask(hub, tmp_path, "count(model('Qwen/Qwen2.5-7B').load())", "model('Qwen/Qwen2.5-7B').weights")
    assert hub.downloads() == ["Qwen/Qwen2.5-7B/model.safetensors"]
    expected = pretrained(repositories[0]["Qwen/Qwen2.5-7B"].folder, tmp_path)
    assert (number, weights) == (sum(p.numel() for p in expected.load().parameters()), expected.weights)
    hub.forget()
    assert ask(hub, tmp_path, "count(model('Qwen/Qwen2.5-7B').load())", HF_HUB_OFFLINE="1") == [number]
    assert not hub.requests


@pytest.mark.long
def test_errors_of_the_hub_say_what_to_do(hub: Hub, tmp_path: Path) -> None:
    gated, reward, absent, revision, malformed, pairs, no_set, split = ask(
        hub, tmp_path, "model('gated/llama').weights", "reward('gated/rm').fingerprint", "model('Qwen/Qwen9').weights",
        "model('Qwen/Qwen2.5-7B', revision='v9').weights", "model('a/b/c').weights",
        "len(read(Preferences(path='gated/pairs'), cache))", "len(read(Preferences(path='nobody/pairs'), cache))",
        "len(read(Preferences(path='NCSOFT/offsetbias', split='tset'), cache))",
    )  # fmt: skip
    license = "is gated. No token is set. Accept its license at"
    assert gated == (
        f"ERROR model.path=gated/llama: gated/llama {license} {hub.url}/gated/llama, and set a token of that account: "
        "HF_TOKEN=… or `hf auth login`."
    )
    assert reward.startswith(f"ERROR reward.path=gated/rm: gated/rm {license} {hub.url}/gated/rm")
    assert absent.startswith("ERROR model.path=Qwen/Qwen9: the hub has no model Qwen/Qwen9 that you can read. Check")
    assert revision.startswith("ERROR model.path=Qwen/Qwen2.5-7B model.revision=v9: Qwen/Qwen2.5-7B has no such rev")
    assert malformed.startswith("ERROR model.path=a/b/c: this is neither a folder nor the name of a model on the hub")
    assert pairs.startswith(f"ERROR data: gated/pairs[train]: gated/pairs {license} {hub.url}/datasets/gated/pairs")
    assert no_set.startswith("ERROR data: nobody/pairs[train]: the hub has no dataset nobody/pairs that you can read")
    assert split.startswith("ERROR data: NCSOFT/offsetbias[tset]: Unknown split")
    wrong, allowed = ask(hub, tmp_path / "b", "model('gated/llama').weights", "1", HF_TOKEN="hf_" + "y" * 34)
    assert wrong.startswith("ERROR model.path=gated/llama: the hub rejected the token (status 401). Set a valid one")
    assert allowed == 1


@pytest.mark.long
def test_without_a_hub_the_error_says_why(hub: Hub, tmp_path: Path) -> None:
    lines = "model('Qwen/Qwen2.5-7B').weights", "len(read(OffsetBias(), cache))"
    for error in ask(hub, tmp_path, *lines, HF_HUB_OFFLINE="1"):
        assert "not completely on this machine (searched: " in error
        assert "HF_HUB_OFFLINE forbids downloads. Unset it, or run `hf download" in error
    for error in ask(hub, tmp_path, *lines, HF_ENDPOINT="http://127.0.0.1:9"):
        assert "not on this machine, and it could not be downloaded from http://127.0.0.1:9" in error
        assert "Check the network and HF_ENDPOINT" in error
    assert not hub.requests


@pytest.mark.long
def test_base_model_without_template_is_offered_one(hub: Hub, tmp_path: Path) -> None:
    error, end, text = ask(
        hub, tmp_path, "model('someone/llama').chat.end_token",
        "model('someone/llama', chat_template='plain').chat.end_token",
        "model('someone/llama', chat_template='plain').chat.render([{'role': 'user', 'content': 'Hi'}])",
    )  # fmt: skip
    assert error.startswith("ERROR the tokenizer of someone/llama has no chat template")
    assert "model.chat_template=plain" in error
    assert "model=llama3.1-8b model.path=someone/llama" in error
    assert (end, text) == (257, "<bos>### User:\nHi\n\n### Assistant:\n")


def test_folder_with_a_missing_shard_is_incomplete(repositories: Any, tmp_path: Path) -> None:
    folder = repositories[0]["gated/rm"].folder
    assert has_weights(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    (tmp_path / "model.safetensors.index.json").write_text((folder / "model.safetensors.index.json").read_text())
    first = next(folder.glob("*.safetensors"))
    (tmp_path / first.name).write_bytes(first.read_bytes())
    assert not has_weights(tmp_path)
