"""The documentation is correct: links resolve, commands compose, settings and files exist, the tutorial runs."""

import functools
import importlib.util
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

import var
from tests.helpers.cli import run
from tests.helpers.rewards import OWN_REWARD
from tests.helpers.runs import ROOT, composed
from var import requirements
from var.config.check import FOLDER
from var.config.entry import add_free_keys
from var.config.schema import TrainerSettings
from var.models.packing import Packed

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "examples" / "README.md"]
OTHER_PROGRAMS = (
    "hf auth login",
    "pip",
    "pytest",
    "ruff",
    "mkdocs",
    "vllm serve",
    "wandb login",
    "wandb sync",
    "make check",
    "python3 -m venv",
    "python tests/same_curves.py",
)
HEREDOC = re.compile(r"^cat > (\S+) <<'EOF'\n(.*?)\nEOF$", re.M | re.S)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_of(page: Path) -> str:
    """Return the text of a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def commands(page: Path) -> list[str]:
    """Return the commands of the bash blocks. Continued lines are joined; files written with `cat` are left out."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    lines = "\n".join(HEREDOC.sub("", block) for block in blocks).replace("\\\n", " ").splitlines()
    return [line.split(" # ")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


# The tutorial is left out because a test of its own runs it.
COMMANDS = [(page.name, command) for page in PAGES if page.name != "tutorial.md" for command in commands(page)]


def test_pages_and_commands_are_found() -> None:
    assert {"index.md", "tutorial.md", "api.md", "peers.md"} <= {page.name for page in DOCS}
    assert len(COMMANDS) > 30


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command_is_valid(page: str, command: str) -> None:
    """For this project's programs, the file exists and the overrides compose. Other programs are known by name."""
    words = shlex.split(re.sub(r"<[^>]*>", "x", command))
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]  # environment variables
    words = [re.sub(r"=\w+\(.*\)$", "=1", word) for word in words]  # a sweeper's interval
    if " ".join(words).startswith(OTHER_PROGRAMS):
        return
    if words[0].startswith("var-"):
        name = words[0].removeprefix("var-")
        assert f'{words[0]} = "var.commands.{name}:command"' in (ROOT / "pyproject.toml").read_text()
        if "--config-dir" in words:  # the reader's own
            return
        words[0] = f"{name}.py"
    program = next((word for word in words if word.endswith((".py", ".sh")) or word.startswith("var.")), "nothing")
    if program.startswith("var."):
        assert importlib.util.find_spec(program) is not None
        return
    assert (ROOT / program).is_file(), command
    overrides = words[words.index(program) + 1 :]
    if program.startswith("launch/") and overrides[0].endswith(".py"):
        program = overrides.pop(0)
        assert (ROOT / program).is_file(), command
    if program == "report.py" or program.startswith("examples/"):
        return
    root = {"sample.py": "sample", "eval.py": "eval", "annotate.py": "annotate"}.get(program, "train")
    if "--config-dir" in overrides:
        at = overrides.index("--config-dir")
        overrides[at : at + 2] = [f"hydra.searchpath=[file://{ROOT / overrides[at + 1]}]"]
    words = [re.split(r",(?![^\[({]*[\])}])", word)[0] for word in overrides if word != "-m"]
    composed(*map(add_free_keys, words), root=root)


@functools.cache
def settings() -> set[str]:
    """Return all groups, and the dotted keys that any YAML sets, without composing them."""
    found = {str(path.relative_to(FOLDER)) for path in Path(FOLDER).rglob("*") if path.is_dir()}
    for path in Path(FOLDER).rglob("*.yaml"):
        package = "" if "@package _global_" in path.read_text() else str(path.parent.relative_to(FOLDER)).strip(".")
        found.update(keys(path, package.replace("/", ".")))
    return found


def keys(path: Path, package: str) -> Iterator[str]:
    """Yield the dotted keys that a YAML sets in a package, its own and those of groups it includes as `/group@key`."""
    content = yaml.safe_load(path.read_text())
    for leaf in leaves(content):
        yield f"{package}.{leaf}".strip(".")
    for entry in content.get("defaults", []) if isinstance(content, dict) else []:
        for included, name in entry.items() if isinstance(entry, dict) else []:
            if included.startswith("/") and "@" in included:
                group, key = included[1:].split("@")
                yield from keys(Path(FOLDER) / group / f"{name}.yaml", f"{package}.{key}".strip("."))


def leaves(node: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted keys of a YAML's content."""
    if not isinstance(node, dict) or not node:  # the keys of an empty mapping are the user's
        yield path
        return
    for key, child in node.items():
        yield from leaves(child, f"{path}.{key}".strip("."))


@each_page
def test_settings_in_the_text_exist(page: Path) -> None:
    """For each `key=value` in a sentence, a YAML sets the key. If the key is a group, it has a file for each value."""
    for span in re.findall(r"`([^`]+)`", text_of(page)):
        words = span.split()
        if not all(re.fullmatch(r"[a-z][\w./]*=[^=\s].*", word) for word in words):
            continue
        for key, _, value in (word.partition("=") for word in words if not word.startswith("hydra.")):
            assert key in settings(), span
            if (Path(FOLDER) / key).is_dir():
                for name in re.split(r"[|,]", value):
                    assert (Path(FOLDER) / key / f"{name}.yaml").is_file(), span


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not link.startswith(("http://", "https://", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), link


@each_page
def test_files_in_the_text_exist(page: Path) -> None:
    folders = "var|conf|tests|experiments|docs|examples|launch|notebooks"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", text_of(page)):
        assert (ROOT / path).exists(), path


@pytest.mark.long
def test_tutorial_runs(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run its commands in order, on a tiny model and few problems. `<folder>` is the newest run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_reward.py").write_text(OWN_REWARD)  # a random model's answers are all wrong
    page = ROOT / "docs" / "tutorial.md"
    for name, content in HEREDOC.findall(page.read_text()):
        (tmp_path / name).write_text(content + "\n")
    all_programs = [f"model.path={tiny_folder}", f"cache={tmp_path}/cache", "generate.max_new_tokens=12"]
    train = ["trainer.accelerator=cpu", "eval.sampling.responses=1", "trainer.max_steps=2"]
    small = ["data.source.problems=12", "data.validation_prompts=3", "reward._target_=own_reward.Distinct"]
    programs, newest = [], ""
    for command in commands(page):
        words = shlex.split(command.replace("<folder>", newest))
        if words[0] != "python":
            continue
        program, *overrides = words[1:]
        if program == "report.py":
            overrides = [*(str(path) for path in sorted(tmp_path.glob("runs/*"))), "--pages=1"]
        else:
            overrides += [*all_programs, *(train if program == "train.py" else ["seeds=[0,1]"])]
            overrides += [] if "data=files" in overrides else small
        done = run(program, *overrides)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        if command in ("python train.py loss=sft", "python train.py loss.temperature=0.5"):
            assert "Sampling" not in done.stdout, "the samples are in the annotation cache"
        programs.append(program)
        newest = max((path.parent for path in tmp_path.glob("runs/*/summary.json")), default=Path("none"),
                     key=lambda folder: (folder / "summary.json").stat().st_mtime_ns).name  # fmt: skip
    assert programs == ["train.py"] * 4 + ["report.py", "eval.py"] + ["train.py"] * 2
    assert len(list(tmp_path.glob("runs/*/model/model.safetensors"))) == 5
    assert (tmp_path / "report" / "report.md").exists()


def test_readme_is_short_and_its_code_is_the_source() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    source: list[str] = []
    for line in filter(None, map(str.strip, code.splitlines())):
        if line.startswith("# "):
            source = [own.strip() for own in (ROOT / line[2:].partition(":")[0]).read_text().splitlines()]
        else:
            assert line in source


def test_table_of_the_readme_has_the_recorded_results() -> None:
    """Each number, and the reward before training, is that of the driver's record, rounded."""
    text, names = (ROOT / "README.md").read_text(), {"VAR, `loss=var_roulette`": "VAR, grouped, roulette"}
    rows = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if re.match(r"\| .*\d ± \d", line)]
    assert len(rows) >= 3
    records = json.loads((ROOT / "experiments" / "reward_kl" / "results-small.json").read_text())
    found = {(r["row"], r["column"]): r for r in records if r["table"] == "At equal numbers of steps"}
    columns = ("reward within 2 nats", "reward at the end", "KL at the end (nats)")
    for label, *numbers in rows:
        cells = [found[names.get(label, label), column] for column in columns]
        *rewards, distance = cells
        assert numbers[:2] == [f"{cell['value']:.3f} ± {cell['se']:.3f}" for cell in rewards]
        assert numbers[2:] == [f"{distance['value']:.1f}"]
        before = found[names.get(label, label), "reward at step 0"]["value"]
        assert f"The reward is {before:.3f} before training" in text
        assert {cell["n"] for cell in cells} == {3}


def test_library_page_runs(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run its code in order, in a folder with a model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_folder)
    parts = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "library.md").read_text(), re.M | re.S)
    assert len(parts) == 4
    names: dict[str, Any] = {}
    for part in parts:
        exec(part, names)
        if shown := re.search(r"^# (tensor\(.*\))", part, re.M):
            assert f"{names['w'].float()}" == shown[1]
    assert names["by_response"].shape == (2,)
    assert names["value"].item() == pytest.approx(math.log(2))  # the policy is the reference


def test_fields_of_a_batch_are_on_their_page() -> None:
    page = (ROOT / "docs" / "batch.md").read_text()
    missing = [field.name for field in fields(Packed) if f"`{field.name}`" not in page]
    assert missing == []
    named = re.findall(r"`(\w+)\((?:\.\.\.)?\)`", page)
    assert [name for name in named if not hasattr(requirements, name)] == []


@pytest.mark.parametrize("module", ["var.weights", "var.losses.var", "var.losses.dpo", "var.requirements"])
def test_weights_and_losses_need_torch_alone(module: str) -> None:
    heavy = ("lightning", "hydra", "omegaconf", "transformers", "datasets", "wandb")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_citation_and_license_match_the_project() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert citation["version"] == var.__version__
    assert f'license = "{citation["license"]}"' in project
    assert citation["preferred-citation"]["url"].endswith("/2502.11026")
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert f"## {citation['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_site_builds(tmp_path: Path) -> None:
    """The strict build succeeds, the API page has the docstrings, and formulas are MathML."""
    for module in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'id="var.losses.var.VAR"' in (tmp_path / "site" / "api" / "index.html").read_text()
    method = (tmp_path / "site" / "method" / "index.html").read_text()
    assert "<math" in method
    assert "arithmatex" not in method
    listed = (tmp_path / "site" / "all_settings" / "index.html").read_text()
    assert "<code>loss.temperature_unit</code></td>\n<td>reward | sd</td>\n<td><code>sd</code>" in listed


def test_page_of_settings_has_types_defaults_and_comments() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        page = importlib.import_module("settings_page").write_page()
    finally:
        sys.path.remove(str(ROOT / "docs"))
    assert "| `data.max_length` | integer | `1024` | tokens of prompt and response together |" in page
    assert "| `loss.temperature` | number | `1.0` | λ; the paper does not give its value |" in page
    assert "(the model answers the prompts, even if the data has responses)" in page  # the second line of a comment
    assert "| `optim.optimizer" in page
    assert "| `#" not in page
    rows = re.findall(r"^\| `([\w.]+)` \|", page, re.M)
    assert {f"trainer.{one.name}" for one in fields(TrainerSettings)} <= set(rows)
