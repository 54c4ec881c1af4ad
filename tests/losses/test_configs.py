"""Every YAML of conf/loss builds a documented loss."""

import functools
import re
import sys
from typing import Any

import pytest
from hydra.utils import get_class, instantiate

from tests.helpers.runs import ROOT, composed
from var.requirements import Requirement

FILES = sorted(p for p in (ROOT / "conf" / "loss").glob("*.yaml") if p.name[0] != "_" and p.stem != "custom")
MODULES = sorted(p.stem for p in (ROOT / "var" / "losses").glob("*.py") if p.stem not in ("__init__", "base", "common"))


@functools.cache
def load(name: str) -> Any:
    """Return the composed group, without interpolations to other groups."""
    return composed(f"loss={name}").loss


def test_every_loss_has_a_file():
    assert len(FILES) > 30
    assert sorted({load(file.stem)._target_.split(".")[2] for file in FILES}) == MODULES


@pytest.mark.parametrize("name", [file.stem for file in FILES])
def test_loss_lists_its_requirements(name):
    loss = instantiate(load(name))
    assert all(isinstance(requirement, Requirement) for requirement in loss.requires)
    assert callable(loss)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_class_is_documented_with_its_paper(file):
    """The loss and its estimator have docstrings of their own. A paper named in the YAML is named in the module."""
    text, cfg = file.read_text(), load(file.stem)
    assert text.startswith("# ")
    for part in (cfg, *(cfg[key] for key in ("estimator", "value", "rollout") if key in cfg)):
        found: Any = get_class(part._target_)
        assert found.__doc__
        assert not found.__doc__.startswith(f"{found.__name__}(")
        assert sys.modules[found.__module__].__doc__
    loss = sys.modules[get_class(cfg._target_).__module__].__doc__ or ""
    for paper in re.findall(r"arXiv (\d{4}\.\d{5})", text):
        assert paper in loss
    assert "arXiv" in loss or cfg._target_.split(".")[2] in ("sft", "weighted")
