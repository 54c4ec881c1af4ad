"""The command of the studies: tables and figures of its parts."""

import json
import sys
from types import SimpleNamespace

import pytest

import experiments.tabular.__main__ as command
from experiments.tabular import frontier
from experiments.tabular.methods import METHODS
from experiments.tabular.worlds import draw_world


def test_the_command_writes_tables_and_figures(tmp_path, monkeypatch, curves):
    """A later part keeps the tables of the others. Tables have means over seeds, and errors next to their numbers."""
    tiny = draw_world(1, prompts=4, letters=2, tokens=2, overlap=0.6)
    sft = next(method for method in METHODS if method.name == "sft")
    made = {
        "frontier": frontier.make_table(world=tiny, methods=[sft], steps=4, sequences=32),
        "stability": curves,
        "few": [{"method": "a", "seed": s, "value": 1.0, "lost": float(s), "lost_error": 0.25} for s in (1, 2)],
    }
    monkeypatch.setattr(
        command, "import_module", lambda name: SimpleNamespace(make_table=lambda: made[name.split(".")[-1]])
    )
    for only in ("frontier,few", "stability"):
        monkeypatch.setattr(sys, "argv", ["tabular", str(tmp_path), "--only", only])
        command.main()
    assert {p.name for p in tmp_path.iterdir()} == {"tables.md", "tables.json", "frontier.png", "stability.png"}
    assert list(json.loads((tmp_path / "tables.json").read_text())) == ["frontier", "few", "stability"]
    text = (tmp_path / "tables.md").read_text()
    assert "| in_batch mean | `var` | mean | x_i | yes |\n| in_batch sum | `var_sum` | sum | x_i | yes |\n" in text
    assert "| in_batch sum, not in the numerator | `var_literal` | sum | x_i | no, as Eq. 10 is printed |\n" in text
    assert "| method | value | lost |\n| --- | --- | --- |\n| a | 1.000 | 1.500 ± 0.250 |\n" in text
    assert all(p.stat().st_size < 200_000 for p in tmp_path.iterdir() if p.suffix == ".png")


def test_an_unknown_part_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tabular", "--only", "fixed,fronteer"])
    with pytest.raises(SystemExit):
        command.main()
    assert "--only: unknown part fronteer." in capsys.readouterr().err
