"""What the documents say is so: links lead somewhere, commands compose, the tutorial runs, the map is the code's."""

import ast
import functools
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, composed
from tests.e2e.test_commands import OWN_REWARD, run
from var.config.check import FOLDER

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "examples" / "README.md"]
OTHERS = ("pip", "pytest", "ruff", "mkdocs", "python3 -m venv")  # commands that are no entry point of ours
HEREDOC = re.compile(r"^cat > (\S+) <<'EOF'\n(.*?)\nEOF$", re.M | re.S)


def text_of(page: Path) -> str:
    """Without code blocks, whose brackets are no links."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def commands(page: Path) -> list[str]:
    """The lines of the bash blocks, continued ones joined; files that are written there left away."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    lines = "\n".join(HEREDOC.sub("", block) for block in blocks).replace("\\\n", " ").splitlines()
    return [line.split(" # ")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


COMMANDS = [(page.name, c) for page in PAGES if page.name != "tutorial.md" for c in commands(page)]  # that one runs


def test_documents_are_seen() -> None:
    assert {"index.md", "tutorial.md", "map.md", "api.md", "peers.md"} <= {page.name for page in DOCS}
    assert len(COMMANDS) > 30


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_is_one(page: str, command: str) -> None:
    """Of ours: the file is there and the overrides compose. Of others: by name."""
    words = shlex.split(re.sub(r"<[^>]*>", "x", command))
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]  # the environment
    words = [re.sub(r"=\w+\(.*\)$", "=1", word) for word in words]  # a sweeper's interval
    if " ".join(words).startswith(OTHERS):
        return
    program = next((word for word in words if word.endswith((".py", ".sh")) or word.startswith("var.")), "nothing")
    if program.startswith("var."):
        assert importlib.util.find_spec(program) is not None
        return
    assert (ROOT / program).is_file(), command
    overrides = words[words.index(program) + 1 :]
    if program == "report.py":
        return
    where = {"sample.py": "sample", "eval.py": "eval"}.get(program, "train")
    if "--config-dir" in overrides:
        at = overrides.index("--config-dir")
        overrides[at : at + 2] = [f"hydra.searchpath=[file://{ROOT / overrides[at + 1]}]"]
    composed(*(re.split(r",(?![^\[({]*[\])}])", word)[0] for word in overrides if word != "-m"), root=where)


@functools.cache
def settings() -> set[str]:
    """Every dotted key that some YAML sets, and every group; what composing each of them would show, at no cost."""
    known = {str(path.relative_to(FOLDER)) for path in Path(FOLDER).rglob("*") if path.is_dir()}
    for path in Path(FOLDER).rglob("*.yaml"):
        package = "" if "@package _global_" in path.read_text() else str(path.parent.relative_to(FOLDER)).strip(".")
        known |= {f"{package.replace('/', '.')}.{key}".strip(".") for key in leaves(yaml.safe_load(path.read_text()))}
    return known


def leaves(node: Any, path: str = "") -> Iterator[str]:
    """Dotted keys of a YAML's content."""
    if not isinstance(node, dict):
        yield path
        return
    for key, child in node.items():
        yield from leaves(child, f"{path}.{key}".strip("."))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_in_the_text_exist(page: Path) -> None:
    """`key=value` in a sentence: the key is some YAML's; of a group's, there is a file of that name."""
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
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not link.startswith(("http://", "https://", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_in_the_text_exist(page: Path) -> None:
    folders = "var|conf|tests|experiments|docs|examples|launch|notebooks"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", text_of(page)):
        assert (ROOT / path).exists(), path


def modules() -> dict[str, str]:
    """Each module of the package, and the first line of its docstring; empty ones are none."""
    found = {}
    for path in sorted((ROOT / "var").rglob("*.py")):
        if path.read_text().strip():
            found[str(path.relative_to(ROOT))] = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
    return found


def test_the_map_is_the_codes() -> None:
    """Every module once, and its line is how its docstring begins."""
    rows = re.findall(r"^\| `(var/[\w/]+\.py)` \| (.+) \|$", (ROOT / "docs" / "map.md").read_text(), flags=re.M)
    said, there = dict(rows), modules()
    assert len(said) == len(rows)
    assert {path: there[path] for path in there.keys() - said.keys()} == {}, "add these to docs/map.md"
    assert said.keys() - there.keys() == set()
    off = {path: line for path, line in said.items() if not there[path].startswith(line.replace("\\|", "|"))}
    assert off == {}


@pytest.mark.long
def test_the_tutorial_runs(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands in order, on a tiny model and few problems; the runs that it names are those that it made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_reward.py").write_text(OWN_REWARD)  # a random model's answers are all wrong
    page = ROOT / "docs" / "tutorial.md"
    for name, content in HEREDOC.findall(page.read_text()):
        (tmp_path / name).write_text(content + "\n")
    both = [f"model.path={tiny_folder}", f"cache={tmp_path}/cache", "generate.max_new_tokens=12"]
    train = ["trainer.accelerator=cpu", "eval.sampling.responses=1", "trainer.max_steps=2"]
    small = ["data.source.problems=12", "data.validation_prompts=3", "reward._target_=own_reward.Distinct"]
    ran, newest = [], ""
    for command in commands(page):
        words = shlex.split(command.replace("<folder>", newest))
        if words[0] != "python":
            continue
        program, *overrides = words[1:]
        if program == "report.py":
            overrides = [*(str(path) for path in sorted(tmp_path.glob("runs/*"))), "--pages=1"]
        else:
            overrides += [*both, *(train if program == "train.py" else ["seeds=[0,1]"])]
            overrides += [] if "data=files" in overrides else small
        done = run(program, *overrides)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        if command in ("python train.py loss=sft", "python train.py loss.temperature=0.5"):
            assert "Sampling" not in done.stdout, "the store has it"
        ran.append(program)
        newest = max((path.parent for path in tmp_path.glob("runs/*/summary.json")), default=Path("none"),
                     key=lambda folder: (folder / "summary.json").stat().st_mtime_ns).name  # fmt: skip
    assert ran == ["train.py"] * 4 + ["report.py", "eval.py"] + ["train.py"] * 2
    assert len(list(tmp_path.glob("runs/*/model/model.safetensors"))) == 5
    assert (tmp_path / "report" / "report.md").exists()


def test_the_citation_and_the_licence() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{cited["version"]}"' in project
    assert f'license = "{cited["license"]}"' in project
    assert cited["preferred-citation"]["url"].endswith("/2502.11026")
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert f"## {cited['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_site_builds(tmp_path: Path) -> None:
    for needed in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'id="var.losses.var.VAR"' in (tmp_path / "site" / "api" / "index.html").read_text()
