"""The figure of the README: reward against KL, and against time once that has run, from the results of the items.

    python -m experiments.hero

It has some of the rows, so that lines stay distinct. The items' own pages have all. Run it after the items.
"""

from collections.abc import Sequence

from experiments.cells import draw_panel, figure, read_results
from experiments.items import ITEMS
from experiments.items.paths import PANEL
from experiments.jobs import ROOT

PATH = ROOT / "experiments" / "hero.png"
PANELS: dict[str, tuple[str, Sequence[str]]] = {
    "reward_kl": (
        "At equal numbers of steps",
        (
            "optimum of RLHF, all λ", "SFT on right answers", "VAR, the paper's", "VAR, grouped, roulette", "DPO",
            "GRPO", "VAR, online",
        ),
    ),
    "reward_time": ("", ("SFT on right answers", "VAR, grouped, roulette", "DPO", "GRPO", "VAR, online")),
}  # fmt: skip
"""The table of each item, and its rows."""


def main() -> None:
    """Draw the figure."""
    names = list(dict.fromkeys(row for _, rows in PANELS.values() for row in rows))
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    results = {name: dict(read_results(ROOT / "experiments" / name)).get("small") for name in PANELS}
    finished = [name for name in PANELS if results[name]]
    with figure(PATH, len(finished)) as axes:
        for axis, name in zip(axes, finished, strict=True):
            title, rows = PANELS[name]
            table = next(table for table in ITEMS[name].sizes["small"] if table.title == title)
            own = [cell for cell in results[name] or () if cell.table == title]
            draw_panel(axis, table, own, PANEL, [row for row in table.rows if row.label in rows], colors)


if __name__ == "__main__":
    main()
