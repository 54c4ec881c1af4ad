"""Write the page with all settings: each key of conf/ with its type, its default and what its comment says."""

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from var.config import schema, signatures  # noqa: E402
from var.data.settings import DataSettings  # noqa: E402

CONF = ROOT / "conf"
LINE = re.compile(r"(?P<indent> *)(?P<key>[\w.-]+): *(?P<value>[^#\s].*?)?(?: *# (?P<text>.*))?")
MORE = re.compile(r" +# (?P<text>.*)")
TYPES: dict[str, type] = {  # by file or by folder; others name their class in the YAML
    "train": schema.RunSettings, "eval": schema.EvalConfig, "conf/data": DataSettings,
    "conf/trainer": schema.TrainerSettings, "conf/eval": schema.EvalSettings,
}  # fmt: skip
NOT_SETTINGS = ("defaults", "hydra", "architecture")


@dataclass
class Setting:
    """A key of a file."""

    key: str
    default: str
    text: list[str] = field(default_factory=list)
    """The lines of its comment."""
    type: str = ""


def read_file(path: Path) -> tuple[str, list[Setting]]:
    """Return what the head of a YAML says, and its keys."""
    head, found, place = list[str](), list[Setting](), list[tuple[int, str]]()
    for line in path.read_text().splitlines():
        if line.startswith("#") and not found and not place:
            head.append(line.lstrip("# "))
        elif (more := MORE.fullmatch(line)) and found:
            found[-1].text.append(more["text"])
        elif match := LINE.fullmatch(line):
            indent = len(match["indent"])
            place = [*(one for one in place if one[0] < indent), (indent, match["key"])]
            names = [name for _, name in place]
            if names[0].split("@")[0] in NOT_SETTINGS or names[-1] == "_target_" or names[-1].startswith("override"):
                continue
            if match["value"] or match["text"]:
                found.append(Setting(".".join(names), match["value"] or "", [match["text"]] if match["text"] else []))
    return " ".join(head), found


def name_type(hint: Any) -> str:
    """Return an annotation in words that a user knows."""
    if hint is Any or hint is None:
        return ""
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if parts := get_args(hint):
        names = [name for part in parts if (name := name_type(part))]
        text = " | ".join(dict.fromkeys(names))
        return {list: f"list of {text}", dict: "", tuple: ""}.get(get_origin(hint), text)  # type: ignore[arg-type]
    known = {NoneType: "null", int: "integer", float: "number", str: "text", bool: "true | false"}
    return known.get(hint, "")


def list_types(path: Path) -> Mapping[str, str]:
    """Return the types of the keys of a file, of the classes that it configures and of the schema."""
    owner = path.stem if path.parent == CONF else str(path.parent.relative_to(ROOT))
    found = get_type_hints(TYPES[owner]) if owner in TYPES else {}

    def visit(content: Any, prefix: str) -> None:
        if not isinstance(content, dict):
            return
        if target := content.get("_target_"):
            for name, parameter in (signatures.read(target) or {}).items():
                found[prefix + name] = parameter.annotation
        for name, value in content.items():
            visit(value, f"{prefix}{name}.")

    visit(merge(path), "")
    return {name: name_type(hint) for name, hint in found.items()}


def merge(path: Path) -> dict[str, Any]:
    """Return the content of a YAML with that of its bases in the same folder."""
    content = yaml.safe_load(path.read_text()) or {}
    merged: dict[str, Any] = {}
    for base in content.get("defaults", []):
        if isinstance(base, str) and base != "_self_" and (file := path.parent / f"{base}.yaml").exists():
            merged |= merge(file)
    return merged | content


def list_sections() -> Iterator[tuple[str, str, str, list[Setting]]]:
    """Yield (file, prefix of its keys, head, settings): the commands first, then the groups."""
    groups = sorted(path for path in CONF.glob("*/*.yaml") if path.parent.name not in ("experiment", "debug", "hydra"))
    for path in [*sorted(CONF.glob("*.yaml")), *groups]:
        group = "" if path.parent == CONF else path.parent.name
        head, settings = read_file(path)
        types = list_types(path)
        for setting in settings:
            setting.type = types.get(setting.key, "")
        prefix = f"{group}." if group else ""
        if any(setting.text for setting in settings):
            yield str(path.relative_to(ROOT)), prefix, head, settings


def write_page() -> str:
    """Return the page in Markdown."""

    def code(text: str) -> str:
        return f"`{text}`".replace("|", "\\|") if text else ""

    lines = [
        "# All settings", "",
        "The keys of `conf/`, from the files themselves. A file that extends another one has only what it changes, and "
        "a file without comments is left out. `python train.py --help` lists the groups, and `python train.py --cfg "
        "job` prints the composed configuration.", "",
    ]  # fmt: skip
    for file, prefix, head, settings in list_sections():
        lines += [f"## {file}", "", head, "", "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        for one in settings:
            meaning = " ".join(one.text).replace("|", "\\|")
            kind = one.type.replace("|", "\\|")
            lines.append(f"| {code(prefix + one.key)} | {kind} | {code(one.default)} | {meaning} |")
        lines.append("")
    return "\n".join(lines)
