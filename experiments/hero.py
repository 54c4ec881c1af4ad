"""The figure of the README: reward against KL and against time, from the results of the two items.

    python -m experiments.hero

It has some of the rows, so that lines stay distinct. The items' own pages have all. Run it after both items.
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
        ("optimum of RLHF, all λ", "SFT on the best of 4", "VAR, the paper's", "VAR, grouped, roulette", "DPO", "GRPO"),
    ),
    "reward_time": ("", ("SFT on the best of 4", "VAR, grouped, roulette", "DPO", "GRPO", "VAR, online")),
}
"""The table of each item, and its rows."""


def main() -> None:
    """Draw the figure."""
    names = list(dict.fromkeys(row for _, rows in PANELS.values() for row in rows))
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    with figure(PATH, len(PANELS)) as axes:
        for axis, (name, (title, rows)) in zip(axes, PANELS.items(), strict=True):
            table = next(table for table in ITEMS[name].sizes["small"] if table.title == title)
            cells = dict(read_results(ROOT / "experiments" / name))["small"]
            own = [cell for cell in cells if cell.table == title]
            draw_panel(axis, table, own, PANEL, [row for row in table.rows if row.label in rows], colors)


if __name__ == "__main__":
    main()
