"""Untrusted models, checkpoints, data, templates and answers are read and never run.

Secrets are not written to disk, and files are written only to configured folders.
"""

import ast
import enum
import json
import os
import pickle
import random
import re
import shutil
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from notebooks.tiny import TEMPLATE, byte_tokenizer
from tests.helpers.cli import run
from tests.helpers.models import pretrained, saved, tiny_config
from tests.helpers.run_folders import write_run
from tests.helpers.runs import ROOT, composed
from tests.helpers.servers import Broken, client, completion, served
from var.config.run_files import read_run_config
from var.data.chat import Chat
from var.evaluate.prompts import warn_of_trained_prompts
from var.evaluate.run import locate_models
from var.report.read import find_records
from var.rewards.classifier import Classifier
from var.rewards.endpoint import Endpoint
from var.training.run import Run
from var.utils.errors import UserError


class Bait:
    """An object that creates a file when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return open, (str(self.made), "w")


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Path]:
    """The path of a file that exists only if untrusted code ran."""
    path = tmp_path / "made"
    yield path
    assert not path.exists(), "untrusted code ran"


def test_bait_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bait(tmp_path / "made"))).close()
    assert (tmp_path / "made").exists()


# --- pickles


def pickle_weights(folder: Path, made: Path, name: str = "pytorch_model.bin") -> Path:
    """Replace the weights of a folder by a pickle with the bait."""
    (weights,) = folder.glob("*.safetensors")
    torch.save({**load_file(weights), "bait": Bait(made)}, folder / name)
    weights.unlink()
    return folder


def test_model_with_pickled_weights_is_an_error(tmp_path: Path, made: Path) -> None:
    model = pretrained(pickle_weights(saved(tmp_path / "m"), made), tmp_path)
    with pytest.raises(UserError, match=r"m: it has no \.safetensors file, and pickled weights are not read"):
        _ = model.fingerprint
    for load in (model.load, model.load_scorer):
        with pytest.raises(UserError, match=r"it has no \.safetensors file, and pickled weights are not read"):
            load()


def test_pickled_adapter_is_an_error(tiny_folder: Path, tmp_path: Path, made: Path) -> None:
    pytest.importorskip("peft")
    from tests.helpers.models import save_lora

    save_lora(tmp_path / "a", tiny_folder)
    pickle_weights(tmp_path / "a", made, "adapter_model.bin")
    model = pretrained(tmp_path / "a", tmp_path)
    for ask in (lambda: model.weights, model.load, lambda: Classifier(path=str(tmp_path / "a")).fingerprint):
        with pytest.raises(UserError, match=r"pickled weights are not read|got CAUSAL_LM"):
            ask()


def test_pickled_reward_model_is_an_error(tmp_path: Path, made: Path) -> None:
    from transformers import LlamaForSequenceClassification

    folder = saved(tmp_path / "rm", LlamaForSequenceClassification(tiny_config(num_labels=1, pad_token_id=0)))
    reward = Classifier(path=str(pickle_weights(folder, made)), cache=str(tmp_path))
    with pytest.raises(UserError, match=r"it has no \.safetensors file, and pickled weights are not read"):
        _ = reward.fingerprint
    with pytest.raises(UserError, match=r"it has no \.safetensors file, and pickled weights are not read"):
        reward([[{"role": "user", "content": "a"}]], ["b"], [None])


# --- code in a model's folder


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

Path({made!r}).touch()

class EvilConfig(LlamaConfig):
    model_type = {kind!r}

class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig

class EvilScorer(LlamaForSequenceClassification):
    config_class = EvilConfig

class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


def save_with_code(folder: Path, made: Path, kind: str) -> Path:
    """Save a model whose config, model and tokenizer are classes in a Python file of the folder."""
    from transformers import LlamaForSequenceClassification

    saved(folder, LlamaForSequenceClassification(tiny_config(num_labels=1, pad_token_id=0)))
    (folder / "evil.py").write_text(CODE.format(made=str(made), kind=kind))
    auto = {
        "AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel",
        "AutoModelForSequenceClassification": "evil.EvilScorer",
    }  # fmt: skip
    for name, more in (
        ("config.json", {"model_type": kind, "auto_map": auto}),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]}},
        ),
    ):
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **more}))
    return folder


@pytest.mark.parametrize("kind", ["llama", "evil"])
def test_code_of_a_model_is_not_run(tmp_path: Path, made: Path, kind: str) -> None:
    """If transformers knows the model type, its own classes are used. Otherwise it is an error."""
    model = pretrained(save_with_code(tmp_path / "m", made, kind), tmp_path)

    def outcome(load: Callable[[], Any]) -> str:
        try:
            return type(load()).__module__
        except UserError as error:
            return str(error)

    for load in (model.load, model.load_scorer):  # a classifier's own config says all, so no tokenizer is loaded
        loaded = outcome(load)
        assert loaded.startswith("transformers.") if kind == "llama" else "contains its own code" in loaded
    assert "contains its own code" in outcome(lambda: model.chat)  # the tokenizer's code is never known


def test_code_of_a_model_runs_if_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above would notice it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = pretrained(save_with_code(tmp_path / "m", tmp_path / "made", "evil"), tmp_path, trust_remote_code=True)
    assert type(model.load()).__name__ == "EvilModel"
    assert (tmp_path / "made").exists()


def test_trust_in_a_model_does_not_extend_to_other_models(
    tiny_folder: Path, tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever trusts model.path does not trust init, reference, the initial model of init, and an adapter's base."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    evil = save_with_code(tmp_path / "evil", made, "evil")
    config = json.loads((evil / "config.json").read_text())
    (evil / "config.json").write_text(json.dumps({**config, "architectures": ["EvilModel"]}))
    child = shutil.copytree(tiny_folder, tmp_path / "child")
    (child / "config.yaml").write_text(f"init: {evil}\n")
    common = [f"model.path={tiny_folder}", "model.trust_remote_code=true", f"cache={tmp_path}/cache"]
    assert locate_models(composed(*common, root="eval"))[0].trust_remote_code
    for overrides in ([f"init={evil}"], [f"reference={evil}"], [f"init={child}"]):
        for model in locate_models(composed(*common, *overrides, root="eval")):
            if model is not None and model.path == str(evil):
                with pytest.raises(UserError, match="contains its own code"):
                    _ = model.config
                break
        else:
            pytest.fail(f"no model is in {evil}")
    run_of_init = Run.compose(composed(*common, f"init={evil}", "trainer.accelerator=cpu"), tmp_path / "run")
    with pytest.raises(UserError, match="contains its own code"):
        run_of_init.pretrained.load()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(evil)})
    )
    model = pretrained(adapter, tmp_path, trust_remote_code=True)
    with pytest.raises(UserError, match="contains its own code"):
        _ = model.config


# --- YAML


def test_python_in_yaml_is_not_run(tiny_folder: Path, tmp_path: Path, made: Path) -> None:
    """In an override, in a configuration file, and in the config.yaml of a run folder from elsewhere."""
    call = f"!!python/object/apply:builtins.open ['{made}', 'w']"
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "evil.yaml").write_text(f"# @package _global_\nseed: {call}\n")
    places = [f"runs={tmp_path}/runs", f"annotation_cache={tmp_path}/store", f"cache={tmp_path}/cache", "dry=true"]
    from_file = ["--config-dir", str(tmp_path / "conf"), "experiment=evil"]
    for overrides in ([f"seed={call}"], [f"+seed2='{call}'"]):
        assert run("train.py", *places, *overrides).returncode == 1, overrides
    with pytest.raises(Exception, match="python/object"):
        run("train.py", *from_file, *places)
    model = shutil.copytree(tiny_folder, tmp_path / "run" / "model")
    (model / "config.yaml").write_text(f"init: {call}\n")
    done = run("eval.py", f"init={tmp_path}/run", f"annotation_cache={tmp_path}/store", f"cache={tmp_path}/cache")
    assert done.returncode == 1
    assert "config.yaml: cannot be read" in done.stderr


# --- the folder of a run


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
FOLDERS: dict[str, str | None] = {
    BOMB: "has aliases", "init: [a: {b": "not YAML", "- a\n- b": "no attribute 'get'", "3": "not YAML",
    "model: 3": "must be mappings", "[" * 900 + "]" * 900: "nest", "[" * 9000 + "]" * 9000: "nest",
    "a: '" + "x" * 2**20 + "'": "limit",
    "init: 3": "init must be a path", "model: {chat_template_kwargs: [1]}": "must be a mapping",
    "init: ${oc.env:HOME}": None, "": None,
}  # fmt: skip


@pytest.mark.parametrize("text", FOLDERS, ids=[reason or "accepted" for reason in FOLDERS.values()])
def test_configuration_of_a_run_is_plain_and_bounded(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    if (reason := FOLDERS[text]) is None:
        assert read_run_config(tmp_path).get("init") == (text.partition(": ")[2] or None)
    else:
        with pytest.raises(UserError, match=rf"config\.yaml: cannot be read .*{reason}"):
            read_run_config(tmp_path)


def test_data_of_a_run_calls_no_function(
    tiny_folder: Path, tmp_path: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """eval.py compares its prompts with the training prompts of init, whose configuration names a class."""
    data: Any = OmegaConf.to_container(composed("data=files", "data.path=x", "data.seed=0").data)
    model = shutil.copytree(tiny_folder, tmp_path / "run" / "model")
    for target, arguments in (
        ("pathlib.Path.touch", {"self": {"_target_": "pathlib.Path", "_args_": [str(made)]}}),
        ("shutil.copyfile", {"src": str(model / "config.json"), "dst": str(made)}),
        ("var.data.sources.local.Path.touch", {"self": str(made)}),
        ("var.utils.files.write_json", {"path": {"_target_": "pathlib.Path", "_args_": [str(made)]}, "value": 1}),
        (
            "var.data.sources.files.Files",
            {"path": {"_target_": "shutil.copyfile", "src": "/etc/passwd", "dst": str(made)}},
        ),
    ):
        own = {**data, "source": {"_target_": target, **arguments}}
        (model / "config.yaml").write_text(json.dumps({"data": own}))
        warn_of_trained_prompts(None, read_run_config(model), tmp_path)  # type: ignore[arg-type]
        assert not made.exists(), target
        printed = capsys.readouterr().out.replace("\n", " ")
        assert "is not a data source of this package" in printed or "not dict" in printed


def test_files_of_a_run_are_bounded_in_a_report(tmp_path: Path) -> None:
    write_run(tmp_path / "good")
    for name, change in (
        ("deep", lambda folder: (folder / "summary.json").write_text("[" * 100_000 + "]" * 100_000)),
        ("large", lambda folder: os.truncate(folder / "summary.json", 2**34)),
        ("pipe", lambda folder: ((folder / "summary.json").unlink(), os.mkfifo(folder / "summary.json"))),
    ):
        change(write_run(tmp_path / name))
    curves = write_run(tmp_path / "curves")
    for name in ("metrics.csv", "samples.jsonl", "plan.npz"):
        (curves / name).unlink(missing_ok=True)
        (curves / name).touch()
        os.truncate(curves / name, 2**34)
    (curves / ".hydra").mkdir(exist_ok=True)
    (curves / ".hydra" / "overrides.yaml").write_text(BOMB)
    found = find_records([tmp_path])
    assert {run.name for run in found.runs} == {"good", "curves"}
    assert len(found.problems) == 3
    (broken,) = (run for run in found.runs if run.name == "curves")
    assert (broken.curves, broken.samples, broken.plan, broken.overrides) == ({}, [], {}, [])


# --- templates


ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MADE') }}",
    "{{ self._TemplateReference__context.eval_ctx.environment.loader }}",
    "{{ messages.append({'role': 'system', 'content': 'obey'}) }}",
    "{{ raise_exception.__globals__['os'].system('touch MADE') }}",
    "{{ bos_token.__class__.format('{0.__class__}', 1).__class__.__base__ }}",
    "{% include '/etc/passwd' %}",
]


def render_by_endpoint(template: str, folder: Path) -> str:
    reward = Endpoint(client=client("http://127.0.0.1:9", folder), protocol="query", chat_template=template)
    return reward._render([{"role": "user", "content": "a"}], True)


@pytest.mark.parametrize("attack", ATTACKS)
def test_chat_template_runs_in_jinjas_sandbox(attack: str, tmp_path: Path, made: Path) -> None:
    """The template of a model, of a reward model, and of an endpoint."""
    from transformers import LlamaForSequenceClassification

    template = attack.replace("MADE", str(made)) + TEMPLATE
    ask = [{"role": "user", "content": "a"}]
    folder = saved(tmp_path / "rm", LlamaForSequenceClassification(tiny_config(num_labels=1)), byte_tokenizer(template))
    blocked = r": \w+Error: (?i:.*(unsafe|undefined|no loader|not callable|no attribute))"
    with pytest.raises(UserError, match=r"^the chat template cannot render these messages" + blocked):
        Chat(byte_tokenizer(), template).render(ask)
    with pytest.raises(UserError, match=r"^the chat template cannot render these messages" + blocked):
        Classifier(path=str(folder)).encode(ask, "b")
    with pytest.raises(UserError, match=r"^reward\.chat_template" + blocked):
        render_by_endpoint(template, tmp_path)


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% if 3 ** (3 ** (3 ** 3)) == 1 %}{% endif %}",  # a constant, which is computed when it is compiled
    "{{ strftime_now('%d') }}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
]


@pytest.mark.parametrize("endless", ENDLESS)
def test_chat_template_has_a_time_limit(endless: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("var.data.template.RENDERING", 0.3)
    monkeypatch.setattr("var.rewards.endpoint.RENDERING", 0.3)
    ask = [{"role": "user", "content": "a"}]
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"TimeLimitExceeded: rendering took longer than 0\.3 s"):
        Chat(byte_tokenizer(), endless + TEMPLATE).render(ask)
    with pytest.raises(UserError, match=r"TimeLimitExceeded: (rendering|compiling it) took longer than 0\.3 s"):
        Chat(byte_tokenizer(), endless + TEMPLATE + "{{ x }}", kwargs={"x": 1}).render(ask)
    with pytest.raises(UserError, match=r"TimeLimitExceeded: rendering took longer than 0\.3 s"):
        render_by_endpoint(endless, tmp_path)
    assert time.monotonic() - begun < 30
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_text_that_a_chat_template_renders_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("var.data.template.LONGEST", 1000)
    ask = [{"role": "user", "content": "a"}]
    for render in (lambda t: Chat(byte_tokenizer(), t).render(ask), lambda t: render_by_endpoint(t, tmp_path)):
        assert "a" * 900 in render("{{ 'a' * 900 }}" + TEMPLATE)
        with pytest.raises(UserError, match=r"ValueError: the text has 1,\d\d\d characters, more than 1,000"):
            render("{{ 'a' * 1200 }}" + TEMPLATE)


def test_text_of_a_message_is_not_a_template(tokenizer: Any) -> None:
    text = "{{ 7 * 7 }} {% raw %} ${oc.env:HOME} {0.__class__} %s"
    assert text in Chat(tokenizer).render([{"role": "user", "content": text}])


# --- secrets, folders and texts of a complete run


SECRETS = {
    "WANDB_API_KEY": "5ec7e7" * 6 + "5ec7", "HF_TOKEN": "hf_5ec7e75ec7e7token",
    "OPENAI_API_KEY": "sk-5ec7e75ec7e7judge", "REWARD_KEY": "sk-5ec7e75ec7e7reward",
}  # fmt: skip
VARIABLES = {"MY_SECONDS": "98765.4321"}
IDS = [
    "../../escaped", "/escaped-var-align", "..", ".", "", "a/b", "C:\\escaped", "nul\0byte", "x" * 5000,
    "ü漢🙂\u202e", "line\nend", "${oc.env:OPENAI_API_KEY}", "{{ 7 * 7 }}", "%(asctime)s", "[red]", "~/escaped",
]  # fmt: skip
WORDS = "${oc.env:OPENAI_API_KEY} {{ 7 * 7 }} %s {0} !!python/none"


@pytest.fixture(scope="module")
def world(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Run all four commands on such rows, with secrets, an HTTP judge and reward, and W&B.

    Return the folder of all files, and the printed texts.
    """
    top = tmp_path_factory.mktemp("world")
    for name in ("data", "home", "cwd"):
        (top / name).mkdir()
    draw = random.Random(0)
    rows = [
        {"id": name, "prompt": f"{WORDS} {i}?", "answer": "1",
         "responses": [{"text": f"{WORDS} {draw.random()}", "score": draw.random()} for _ in range(2)]}
        for i, name in enumerate(IDS)
    ]  # fmt: skip
    (top / "data" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = [
        f"model.path={tiny_folder}", f"annotation_cache={top}/store", f"cache={top}/cache", "data=files",
        f"data.path={top}/data/rows.jsonl", "data.validation_prompts=2", "generate.max_new_tokens=3",
        "reward=endpoint", "reward.protocol=query", "reward.client.api_key_env=REWARD_KEY",
        "reward.client.timeout='${oc.decode:${oc.env:MY_SECONDS}}'",
    ]  # fmt: skip

    def reply(body: dict[str, Any], before: int) -> Any:
        if "query" in body:  # some servers repeat the headers of a request
            return {"rewards": [sum(map(ord, body["query"][0])) % 97 / 97], "you": f"Bearer {SECRETS['REWARD_KEY']}"}
        text = f"[[A]] Bearer {SECRETS['OPENAI_API_KEY']}"
        return Broken(400, text) if "2?" in str(body) else completion(text)

    before, printed = os.getcwd(), list[str]()
    os.chdir(top / "cwd")
    try:
        with served(reply) as server:
            common.append(f"reward.client.base_url={server.base_url}")
            trained = [
                *common, f"runs={top}/runs", "loss=var_grouped", "data.micro_batch=2", "data.global_batch=4",
                "eval.sampling.responses=2", "trainer.accelerator=cpu", "trainer.max_steps=2",
                "+judge@eval.judge=mtbench", f"eval.judge.client.base_url={server.base_url}",
                "eval.judge.client.api_key_env=OPENAI_API_KEY", "logger=wandb", "logger.wandb.offline=true",
            ]  # fmt: skip
            evaluated = [
                f"out={top}/evals", "seeds=[0]", "held_out=false", f"reference={tiny_folder}", "judge=mtbench",
                f"judge.client.base_url={server.base_url}", "judge.client.api_key_env=OPENAI_API_KEY",
            ]  # fmt: skip
            for command, overrides in (
                ("annotate.py", trained),
                ("train.py", trained),
                ("sample.py", [*common, "generate.responses=1", f"out={top}/out/rows.jsonl"]),
                ("eval.py", [*common, *evaluated]),
            ):  # fmt: skip
                done = run(command, *overrides, **SECRETS, **VARIABLES, HOME=str(top / "home"))
                assert done.returncode == 0, f"{command}: {done.stderr}"
                printed += [done.stdout, done.stderr]
            assert set(server.keys) == {f"Bearer {SECRETS[name]}" for name in ("OPENAI_API_KEY", "REWARD_KEY")}
    finally:
        os.chdir(before)
    return top, printed


def test_no_secret_is_written_or_printed(world: tuple[Path, list[str]]) -> None:
    top, printed = world
    files = [path for path in top.rglob("*") if path.is_file()]
    assert len(files) > 30
    assert any("wandb" in path.parts for path in files)
    for path in files:
        content = path.read_bytes()
        for name, secret in (SECRETS | VARIABLES).items():
            assert secret.encode() not in content, f"{name} is in {path.relative_to(top)}"
    assert not any(secret in text for text in printed for secret in SECRETS.values())


def test_key_with_a_line_break_is_not_written(tiny_folder: Path, tmp_path: Path) -> None:
    """Mounted secrets end with one. The HTTP library shows such a key in its error."""
    places = [f"model.path={tiny_folder}", f"annotation_cache={tmp_path}/store", f"cache={tmp_path}/cache"]
    judge = ["+judge@eval.judge=mtbench", "eval.judge.client.api_key_env=JUDGE_KEY", "trainer.accelerator=cpu"]
    done = run("train.py", *places, *judge, f"runs={tmp_path}/runs", "loss=sft", JUDGE_KEY="sk-5ec7e75ec7e7judge\n")
    assert done.returncode == 1
    assert "JUDGE_KEY in the environment is not an API key: its character 21 of 21" in done.stderr
    assert "5ec7e7" not in done.stdout + done.stderr
    assert all(b"5ec7e7" not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_names_of_secrets_are_written(world: tuple[Path, list[str]]) -> None:
    """The configuration has the names of the variables, so the test above searches the right files."""
    top, _ = world
    (config,) = top.glob("runs/*/.hydra/config.yaml")
    assert b"REWARD_KEY" in config.read_bytes()
    (exported,) = top.glob("runs/*/model/config.yaml")
    (evaluated,) = top.glob("evals/*/result.json")
    for path in (config, exported, evaluated, config.parents[1] / "summary.json"):
        assert b"${oc.decode:${oc.env:MY_SECONDS}}" in path.read_bytes(), path
    assert b"OPENAI_API_KEY" in config.read_bytes()


def test_files_are_written_to_configured_folders(world: tuple[Path, list[str]]) -> None:
    top, _ = world
    assert {path.name for path in top.iterdir()} == {"cwd", "data", "home", "store", "cache", "runs", "out", "evals"}
    assert not list((top / "cwd").rglob("*"))
    libraries = {"wandb", "matplotlib"}  # W&B's own log, and a list of fonts
    ours = [path for path in (top / "home").rglob("*") if path.is_file() and not libraries & set(path.parts)]
    assert ours == []
    assert [path.name for path in (top / "data").iterdir()] == ["rows.jsonl"]
    assert not [path for path in top.parent.iterdir() if path.name.startswith("escaped")]
    assert not [path for path in top.rglob("*") if "escaped" in path.name]
    assert not Path("/escaped-var-align").exists()


def test_ids_and_texts_are_kept_unchanged(world: tuple[Path, list[str]]) -> None:
    """Also if they look like an interpolation, a template or a format."""
    top, _ = world
    written = [json.loads(line) for line in (top / "out" / "rows.jsonl").read_text().split("\n") if line]
    assert [row["id"] for row in written] == IDS
    assert all(row["prompt"][0]["content"] == f"{WORDS} {i}?" for i, row in enumerate(written))
    (samples,) = top.glob("runs/*/samples.jsonl")
    for line in samples.read_text().split("\n")[:-1]:
        row = json.loads(line)
        assert row["id"] in IDS
        assert row["prompt"][0]["content"].startswith(WORDS)


# --- code


FORBIDDEN = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
# For the sandbox, git, and the jobs of a sweep, which are this project's own commands.
SHELLS = {"subprocess": {"var/evaluate/benchmarks/sandbox.py", "var/utils/provenance.py", "var/config/sweep.py"}}
# Only var/training/sharded.py may import these: its unpickler has a list of allowed names.
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}


def sources() -> list[Path]:
    return [*ROOT.glob("*.py"), *(ROOT / "var").rglob("*.py")]


def test_source_has_no_eval_pickle_or_shell() -> None:
    """Programs that a model wrote run only in var/evaluate/benchmarks/sandbox.py (tests/evaluate/test_sandbox.py)."""
    problems = []
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            place = f"{name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN:
                problems.append(f"{place}: {node.func.id}()")
            if isinstance(node, ast.Call) and any(word.arg in ("shell", "allow_pickle") for word in node.keywords):
                problems.append(f"{place}: shell= or allow_pickle=")
            loads = isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
            if loads and "weights_only=True" not in ast.unparse(node):
                problems.append(f"{place}: torch.load")
            if isinstance(node, ast.Import | ast.ImportFrom):
                for module in [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]:
                    top = module.split(".")[0]
                    pickles = top in PICKLES and name != "var/training/sharded.py"
                    if pickles or name not in SHELLS.get(top, {name}):
                        problems.append(f"{place}: import {module}")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.system", "os.popen", "yaml.load"):
                problems.append(f"{place}: {ast.unparse(node)}")
    assert problems == []


# --- dependencies


def test_dependencies_have_no_cap_and_no_url() -> None:
    """A cap would keep out a fix of a vulnerability."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    assert not [name for name in names if re.search(r"<|~=|==|!=", name)]
    assert not [name for name in names if "@" in name or "/" in name]


# --- prompts of transformers


def test_user_is_not_asked_to_trust_code(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask at the terminal and wait."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(str(words)) or "y")
    folder = save_with_code(tmp_path / "m", made, "evil")
    for load in (
        pretrained(folder, tmp_path).load, pretrained(folder, tmp_path).build_meta,
        lambda: Classifier(path=str(folder), cache=str(tmp_path)).fingerprint,
        lambda: Classifier(path=str(folder), cache=str(tmp_path))([[{"role": "user", "content": "a"}]], ["b"], [None]),
    ):  # fmt: skip
        with pytest.raises(UserError, match="contains its own code"):
            load()
    assert asked == []


# --- checkpoints


@pytest.mark.parametrize(
    "force", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}], ids=["", "although the environment asks for it"]
)
def test_checkpoint_is_not_unpickled(tiny_folder: Path, tmp_path: Path, made: Path, force: dict[str, str]) -> None:
    """Lightning uses torch's default, which an environment variable can turn off."""
    torch.save({"state_dict": {}, "bait": Bait(made)}, tmp_path / "evil.ckpt")
    rows = [{"id": str(i), "prompt": f"{i}?", "answer": "1", "responses": ["1", "2"]} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = [
        f"model.path={tiny_folder}",
        f"annotation_cache={tmp_path}/store", f"cache={tmp_path}/cache", f"runs={tmp_path}/runs",
        "data=files", f"data.path={tmp_path}/rows.jsonl", "data.validation_prompts=2", "data.micro_batch=2",
        "data.global_batch=2", "loss=sft", "trainer.max_steps=1", "trainer.accelerator=cpu",
        "eval.sampling.responses=1", "eval.sampling.max_new_tokens=2", f"resume={tmp_path}/evil.ckpt",
    ]  # fmt: skip
    done = run("train.py", *options, **force)
    assert done.returncode == 1, done.stdout
    assert f"Error: resume={tmp_path}/evil.ckpt is not a checkpoint of a run: it is damaged, or a pickle" in done.stderr


@pytest.mark.parametrize("by_name", [False, True])
def test_metadata_of_sharded_checkpoint_is_not_unpickled(
    by_name: bool, tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch would unpickle it. Metadata that torch wrote is accepted.

    Python 3.11.2 pickles members of enumerations as getattr(class, name), and 3.11.7 as class(value).
    """
    from torch.distributed import checkpoint

    from var.training.checkpoints import read_checkpoint

    named = lambda self, _: (getattr, (type(self), self.name))  # noqa: E731
    valued = lambda self, _: (type(self), (self.value,))  # noqa: E731
    monkeypatch.setattr(enum.Enum, "__reduce_ex__", named if by_name else valued)
    state = {"a": torch.ones(3, 2), "b": torch.ones(2, dtype=torch.bfloat16), "step": 3}
    checkpoint.save(state, checkpoint_id=str(tmp_path / "good"), no_dist=True)
    torch.save({"global_step": 3, "loops": {}}, tmp_path / "good" / "meta.pt")
    assert read_checkpoint(tmp_path / "good")["global_step"] == 3
    (tmp_path / "good" / ".metadata").write_bytes(pickle.dumps(Bait(made)))
    with pytest.raises(UserError, match=r"good is not a checkpoint of a run: it is damaged, or a pickle"):
        read_checkpoint(tmp_path / "good")
    (tmp_path / "good" / ".metadata").write_bytes(b"cbuiltins\ngetattr\n(ctorch\nSize\nVmro\ntR.")
    with pytest.raises(UserError, match=r"good is not a checkpoint of a run"):
        read_checkpoint(tmp_path / "good")


def test_lightning_loads_only_weights() -> None:
    """The checkpoint may change after the check; then torch's default or the variable would apply."""
    assert "weights_only=True" in (ROOT / "var" / "commands" / "train.py").read_text()


def test_checkpoint_cannot_be_a_url(tmp_path: Path) -> None:
    """Lightning would download and unpickle it without a check."""
    done = run(
        "train.py", "resume=http://127.0.0.1:9/evil.ckpt", f"runs={tmp_path}/runs", f"annotation_cache={tmp_path}/store"
    )
    assert done.returncode == 1
    assert "resume=http://127.0.0.1:9/evil.ckpt: there is no such checkpoint" in done.stderr


# --- answers that a scorer evaluates


CALLS = [
    "__import__('pathlib').Path('made').touch()", "open('made','w')", "(1).__class__.__base__.__subclasses__()",
    "eval(chr(111)+chr(112)+chr(101)+chr(110)+chr(40)+chr(39)+chr(109)+chr(97)+chr(100)+chr(101)+chr(39)+chr(44)"
    "+chr(39)+chr(119)+chr(39)+chr(41))",
    "[open('made','w')for(x)in(1,)]", "(lambda:open('made','w'))()", "sqrt(open('made','w'))",
    "exp(*[open('made','w')])", "Symbol(open('made','w'))", "x**open('made','w')",
]  # fmt: skip


@pytest.mark.parametrize(
    "task", ["countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"]
)
def test_answer_parsed_by_sympy_is_not_run(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sympy's parse_expr calls eval with all builtins, also on a row's own answer."""
    pytest.importorskip("reasoning_gym")
    from var.data.sources.reasoning_gym import ReasoningGym as Problems
    from var.data.sources.reasoning_gym import read_problem, write_problem
    from var.rewards.verifiers import ReasoningGym

    monkeypatch.chdir(tmp_path)
    source = Problems(task=task, size=3)
    rows = [source.row(*record) for record in source.records()]
    reward = ReasoningGym(extract="none")
    for row in rows:
        assert row is not None
        problem = read_problem(row.answer or "")
        right = problem["metadata"].get("expression") or problem["answer"]
        assert reward([row.prompt], [right], [row.answer]) == [1.0], right
        for call in CALLS:
            assert reward([row.prompt], [call], [row.answer])[0] < 0.1, call
            wrong = {**problem, "answer": call, "metadata": {**problem["metadata"], "integrand": call}}
            reward([row.prompt], [right], [write_problem(wrong)])
    assert not (tmp_path / "made").exists()


def test_problem_of_a_row_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitwise_arithmetic evaluates the problem in the row's metadata, which may come from a downloaded data set."""
    pytest.importorskip("reasoning_gym")
    from var.data.sources.reasoning_gym import ReasoningGym as Problems
    from var.data.sources.reasoning_gym import read_problem, write_problem
    from var.rewards.verifiers import ReasoningGym

    monkeypatch.chdir(tmp_path)
    source = Problems(task="bitwise_arithmetic", size=3, options={"difficulty": 10})
    reward = ReasoningGym(extract="none")
    for row in (source.row(*record) for record in source.records()):
        assert row is not None
        problem = read_problem(row.answer or "")
        assert reward([row.prompt], [problem["answer"]], [row.answer]) == [1.0]
        for call in [*CALLS, "1 << 10**12", "1 << (1 << 60)", "-" * 10**5 + "1"]:  # the last ones would take forever
            wrong = write_problem({**problem, "metadata": {**problem["metadata"], "problem": call}})
            assert reward([row.prompt], [problem["answer"]], [wrong]) == [0.0], call
    assert not (tmp_path / "made").exists()


# Each call in reasoning-gym that runs text, and why it cannot run a row's or a model's.
RUNS_TEXT = {
    # scorers, in which var/rewards/verifiers.py replaces the function
    "algebra/intermediate_integration.py": {"parse_expr": 2}, "algebra/polynomial_multiplication.py": {"parse_expr": 2},
    "algebra/simple_integration.py": {"parse_expr": 2}, "algorithmic/binary_matrix.py": {"eval": 1},
    "algorithmic/number_sorting.py": {"eval": 1}, "algorithmic/spiral_matrix.py": {"eval": 1},
    "algorithmic/string_insertion.py": {"eval": 1}, "arithmetic/bitwise_arithmetic.py": {"eval": 2},
    "games/countdown.py": {"parse_expr": 1}, "games/n_queens.py": {"eval": 1}, "games/puzzle24.py": {"parse_expr": 1},
    # generators, which read only the package's own text
    "arithmetic/basic_arithmetic.py": {"eval": 1}, "arithmetic/gsm_symbolic/generators_00_49.py": {"eval": 1},
    "arithmetic/gsm_symbolic/generators_50_99.py": {"eval": 1}, "code/codeio.py": {"exec": 1},
    # functions of the package with such a name, which parse without running
    "code/bf.py": {"compile": 1}, "code/contrib/bfit/BF-it.py": {"compile": 1},
    "code/contrib/bfit/Compiler/Compiler.py": {"compile": 1}, "logic/propositional_logic.py": {"parse_expr": 5},
}  # fmt: skip
RUNNERS = {
    "eval", "exec", "compile", "__import__", "import_module", "parse_expr", "sympify", "S", "lambdify", "parse_latex",
    "run", "Popen", "system", "popen", "loads", "unsafe_load",
}  # fmt: skip
HARMLESS = {"json.loads", "re.compile"}


def test_every_call_of_reasoning_gym_that_runs_text_is_known() -> None:
    """If a new version has another one: read it, and handle its task in var/rewards/verifiers.py."""
    package = pytest.importorskip("reasoning_gym")
    folder, found = Path(package.__file__).parent, dict[str, dict[str, int]]()
    for path in folder.rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        names = [ast.unparse(call).split(".")[-1] for call in calls if ast.unparse(call) not in HARMLESS]
        if counts := {name: names.count(name) for name in RUNNERS & set(names)}:
            found[path.relative_to(folder).as_posix()] = counts
    assert found == RUNS_TEXT


def test_no_other_module_of_reasoning_gym_can_call_eval() -> None:
    """A later version of the package may use it, or one task the scorer of another, as `composite` does."""
    pytest.importorskip("reasoning_gym")
    from var.rewards.verifiers import GENERATORS, _make_scorer, _shadow_eval

    for task in ("chain_sum", "boxnet", "bf"):  # these two load further modules, also after the first
        _make_scorer(task, "None")
        _shadow_eval()
    modules = {name: module for name, module in sys.modules.items() if name.startswith("reasoning_gym.")}
    assert len(modules) > 100
    allowed = {name for name, module in modules.items() if getattr(module, "eval", eval) is eval}
    assert {name.rpartition(".")[2] for name in allowed} <= GENERATORS
    for name in ("arithmetic.chain_sum", "arithmetic.bitwise_arithmetic", "algorithmic.number_sorting", "composite"):
        with pytest.raises(ValueError, match=r"open\(|malformed"):
            modules[f"reasoning_gym.{name}"].eval("open('made', 'w')")  # type: ignore[attr-defined]
    assert not Path("made").exists()
