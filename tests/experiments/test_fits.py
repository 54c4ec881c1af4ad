"""docs/fits.md is what the memory model says."""

import re
from pathlib import Path

import pytest
from hydra import initialize_config_dir

from experiments.gpu.fits import PAGE, list_models, write_tables
from var.config.check import FOLDER


def read_cells(page: str) -> dict[tuple[str, int, int], str]:
    """Return each cell by model, number of the table, and column."""
    cells = {}
    for table, part in enumerate(page.split("\n## ")[1:]):
        for name, row in re.findall(r"^\| ([\w.-]+) \| (.*) \|$", part, re.M):
            if name not in ("model", "---"):
                cells |= {(name, table, column): cell for column, cell in enumerate(row.split(" | "))}
    return cells


def test_page_has_every_configuration() -> None:
    assert {name for name, *_ in read_cells(PAGE.read_text())} == set(list_models())
    assert Path(FOLDER, "model", "qwen2.5-7b.yaml").stem in list_models()


@pytest.mark.parametrize("name", list_models())
@pytest.mark.long
def test_page_has_the_memory_models_numbers(name: str) -> None:
    """Up to 2 %: PyTorch's temporary tensors differ between versions."""
    with initialize_config_dir(FOLDER, version_base="1.3"):
        found = read_cells(write_tables([name]))
    written = read_cells(PAGE.read_text())
    assert found
    for place, cell in found.items():
        (way, _, size), (way_written, _, size_written) = cell.rpartition(" "), written[place].rpartition(" ")
        assert way == way_written, place
        if cell != "–":
            assert float(size) == pytest.approx(float(size_written), rel=0.02), place
