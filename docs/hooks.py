"""MkDocs: the README, the experiments, examples and notebooks that these pages link to are part of the site."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
SHOWN = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "CITATION.cff")
FOLDERS = ("experiments", "examples", "notebooks", "conf", "launch")
SUFFIXES = {".md", ".txt", ".png", ".svg", ".csv", ".json", ".py", ".yaml", ".tsv", ".ipynb", ".sh"}


def on_files(files: Files, config: Any) -> Files:
    """What stands beside docs/ appears under repository/, as it lies in the repository."""
    found = [ROOT / name for name in SHOWN]
    found += [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES]
    for path in found:
        if path.is_file():
            files.append(File.generated(config, f"repository/{path.relative_to(ROOT)}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links out of docs/ go there, and links from there into docs/ come back."""
    if page.file.src_uri.startswith("repository/"):
        up = "../" * page.file.src_uri.count("/")
        return re.sub(r"\]\((?:\.\./)*docs/", f"]({up}", markdown)
    return re.sub(r"\]\(\.\./", "](repository/", markdown)
