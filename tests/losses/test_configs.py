"""conf/loss: every file names a documented class, states all of its settings, and instantiates."""

import re
import sys
from dataclasses import fields
from typing import Any

import pytest
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from tests.helpers.runs import ROOT
from var.requirements import Need

FILES = sorted((ROOT / "conf" / "loss").rglob("*.yaml"))
MODULES = sorted(p.stem for p in (ROOT / "var" / "losses").glob("*.py") if p.stem not in ("__init__", "base", "common"))


def test_every_file_is_seen_and_every_loss_has_one():
    assert len(FILES) == 37
    targets = {OmegaConf.load(file)._target_.split(".")[2] for file in FILES}
    assert sorted(targets) == MODULES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_instantiates_with_declared_needs(file):
    loss = instantiate(OmegaConf.load(file))
    assert loss.needs <= set(Need)
    assert callable(loss)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_states_every_setting_and_no_other(file):
    """A setting that the file leaves out would be a default that nobody reads. Parts with a _target_ as well."""

    def check(node: dict[str, Any]) -> None:
        settings = {field.name for field in fields(get_class(node["_target_"]))}
        assert set(node) - {"_target_"} == settings
        for part in node.values():
            if isinstance(part, dict):
                check(part)

    check(OmegaConf.to_container(OmegaConf.load(file)))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_class_says_what_it_is_and_where_it_is_from(file):
    """The class and its estimator have docstrings that are not dataclass's own; a paper named in the YAML is named in
    the module."""
    text = file.read_text()
    assert text.startswith("# ")
    for target in re.findall(r"_target_: (\S+)", text):
        found: Any = get_class(target)
        assert found.__doc__
        assert not found.__doc__.startswith(f"{found.__name__}(")
        module = sys.modules[found.__module__].__doc__
        assert module
    loss = sys.modules[get_class(OmegaConf.load(file)._target_).__module__].__doc__ or ""
    for paper in re.findall(r"arXiv (\d{4}\.\d{5})", text):
        assert paper in loss
    assert "arXiv" in loss or {"sft", "weighted"} >= {OmegaConf.load(file)._target_.split(".")[2]}
