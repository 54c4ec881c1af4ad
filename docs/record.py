"""Run a command of this project, and draw what it prints as an SVG that loads nothing else.

    python docs/record.py docs/first_run.svg train.py

The details of the data report and of the settings are left out; an ellipsis shows where.
"""

import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

COLUMNS = 100
LINE, CHARACTER, MARGIN = 17, 8.43, 16  # pixels, for 14 pixels of a monospaced font
FONT = "14px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"
STYLE = f"""
svg {{ color-scheme: light dark; background: light-dark(#fafafa, #1c1c22) }}
text {{ font: {FONT}; white-space: pre; fill: light-dark(#24242c, #e2e2e8) }}
.command {{ font-weight: bold }}
"""
DETAIL = re.compile(r"  \w|model: ")


def shorten(lines: Sequence[str]) -> Iterator[str]:
    """Yield the lines to show, wrapped."""
    before = False
    for line in lines:
        detail = DETAIL.match(line) is not None
        if detail and not before:
            yield "  …"
        if not detail:
            yield from textwrap.wrap(line, COLUMNS, drop_whitespace=False) or [""]
        before = detail


def draw(command: str, lines: Sequence[str]) -> str:
    """Return an SVG of a command and of what it printed."""
    shown = [("command", f"$ {command}"), *(("line", line) for line in lines)]
    width, height = round(COLUMNS * CHARACTER + 2 * MARGIN), LINE * len(shown) + 2 * MARGIN
    texts = [
        f'<text class="{kind}" x="{MARGIN}" y="{MARGIN + LINE * (i + 0.8):g}">{escape(line)}</text>'
        for i, (kind, line) in enumerate(shown)
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    title = f"<title>What {escape(command)} prints</title>"
    return "\n".join([head, title, f"<style>{STYLE}</style>", *texts, "</svg>"]) + "\n"


def main(target: Path, words: Sequence[str]) -> None:
    """Run a command and draw it."""
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True, check=True)
    target.write_text(draw(" ".join(["python", *words]), [*shorten(done.stdout.splitlines())]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
