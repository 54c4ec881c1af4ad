"""MkDocs hooks: add files outside docs/ and the page of settings to the site, and convert formulas to MathML."""

import html
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

from settings_page import ROOT, write_page

PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "CITATION.cff")
FOLDERS = ("experiments", "examples", "notebooks", "conf", "launch", "var")
SUFFIXES = {".md", ".txt", ".png", ".svg", ".csv", ".json", ".py", ".yaml", ".tsv", ".ipynb", ".sh"}


def on_files(files: Files, config: Any) -> Files:
    """Add files outside docs/ to the site under repository/, with their paths in the repository."""
    found = [ROOT / name for name in PAGES]
    found += [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES]
    files.append(File.generated(config, "all_settings.md", content=write_page()))
    for path in found:
        if path.is_file():
            files.append(File.generated(config, f"repository/{path.relative_to(ROOT)}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite links out of docs/ to repository/, and links from repository/ into docs/ back."""
    if page.file.src_uri.startswith("repository/"):
        up = "../" * page.file.src_uri.count("/")
        return re.sub(r"\]\((?:\.\./)*docs/", f"]({up}", markdown)
    return re.sub(r"\]\(\.\./", "](repository/", markdown)


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Convert the formulas that the arithmatex extension marked to MathML, which browsers show without a script."""
    for tag, display, opening, closing in (("span", "inline", r"\\\(", r"\\\)"), ("div", "block", r"\\\[", r"\\\]")):
        content = re.sub(
            rf'<{tag} class="arithmatex">\s*{opening}(.*?){closing}\s*</{tag}>',
            lambda formula: convert(html.unescape(formula[1]), display=display),  # noqa: B023  called in this pass
            content,
            flags=re.S,
        )
    return content
