"""Each setting has one source: no line of conf/ repeats its base, and a Python default differs from it on purpose."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from tests.helpers.runs import composed
from var.config.check import FOLDER, TRAIN
from var.config.signatures import imported

GLOBAL = "@package _global_"
YAMLS = sorted(path for path in Path(FOLDER).glob("*/*.yaml"))
GROUPS = [path for path in YAMLS if GLOBAL not in path.read_text()]

# Lines of experiments that equal the default, and hold for every other choice of model and data too.
PINNED = {
    ("table1", "generate.max_new_tokens"), ("table5", "generate.max_new_tokens"),
    ("table1", "data.global_batch"), ("table1", "model.learning_rate"), ("table5", "data.global_batch"),
    ("frontier", "model.learning_rate"), ("hha", "model.learning_rate"),
    ("limit", "data.sample"), ("overfit", "data.sample"), ("step", "data.sample"),  # they replace an experiment's draw
}  # fmt: skip

# Python defaults that differ from every YAML, or from some YAML on purpose.
VARIANTS = {
    "losses.alol.ALoL": {"ratio", "clip", "beta"},
    "losses.dft.DFT": {"anchor"},
    "losses.grpo.GRPO": {"beta", "clip_high", "normalize", "scale", "length"},
    "losses.var.VAR": {"min_weight", "roulette"},
    "models.pretrained.Pretrained": {"quantization", "repository", "chat_template_kwargs"},
    "rewards.classifier.Classifier": {"dtype", "architecture", "repository"},
    "training.optim.MasterAdamW": {"betas"},  # torch's in Python
    "utils.http_client.Client": {"api_key_env", "price_in", "price_out"},
    "weights.estimators.InBatch": {"reduction", "reference", "reference_in_numerator"},
}
NOT_IN_YAML = {  # set by code
    ("models.pretrained.Pretrained", "cache"), ("models.pretrained.Pretrained", "key"),
    ("rewards.classifier.Classifier", "device"),
}  # fmt: skip


def load(path: Path) -> tuple[DictConfig, DictConfig]:
    """Return a group file's own content, and the content of its bases."""
    own, bases = OmegaConf.load(path), list[Any]()
    assert isinstance(own, DictConfig)
    for base in own.pop("defaults", []):
        if isinstance(base, DictConfig):  # /client@client: _base
            ((place, name),) = base.items()
            if str(place).startswith("override "):  # chooses another group, and is not a base
                continue
            group, _, key = str(place).strip("/").partition("@")
            bases.append({key: OmegaConf.merge(*reversed(load(Path(FOLDER, group, f"{name}.yaml"))))})
        elif base != "_self_":
            bases.append(OmegaConf.merge(*reversed(load(path.parent / f"{base}.yaml"))))
    merged = OmegaConf.merge({}, *bases)
    assert isinstance(merged, DictConfig)
    return own, merged


def find_repeated(own: Any, base: Any, path: str = "") -> Iterator[str]:
    """Yield the keys of leaves that have the same value in both."""
    if isinstance(own, dict) and isinstance(base, dict):
        for key in own.keys() & base.keys():
            yield from find_repeated(own[key], base[key], f"{path}.{key}".strip("."))
    elif own == base and type(own) is type(base):
        yield path


@pytest.mark.parametrize("path", GROUPS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_line_repeats_its_base(path: Path) -> None:
    own, base = load(path)
    assert list(find_repeated(OmegaConf.to_container(own), OmegaConf.to_container(base))) == []


@pytest.mark.parametrize("path", sorted({*YAMLS} - {*GROUPS}), ids=lambda path: path.stem)
def test_no_line_of_an_experiment_repeats_the_default(path: Path) -> None:
    own: Any = OmegaConf.to_container(OmegaConf.load(path))
    words = []
    for default in own.pop("defaults", []):
        if isinstance(default, dict):
            ((place, name),) = default.items()
            words.append(f"{place.removeprefix('override ').lstrip('/')}={name}")
        elif default != "_self_":
            words.append(f"experiment={default}")
    base = OmegaConf.to_container(composed(*(f"+{word}" if "@" in word else word for word in words)))
    assert {(path.stem, key) for key in find_repeated(own, base)} <= PINNED


def find_parts(node: Any) -> Iterator[dict[str, Any]]:
    """Yield the parts of a group that name one of our classes."""
    if isinstance(node, dict):
        if str(node.get("_target_")).startswith("var."):
            yield node
        for child in node.values():
            yield from find_parts(child)


@pytest.mark.parametrize("path", GROUPS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_setting_is_in_the_yaml_and_equals_the_python_default(path: Path) -> None:
    """Every setting of every option can then be overridden without a plus sign."""
    if path.name.startswith("_"):
        return
    own, base = load(path)
    group: Any = OmegaConf.to_container(OmegaConf.merge(base, own))
    if path.parent.name in TRAIN:
        group["_target_"] = TRAIN[path.parent.name]
    for part in find_parts(group):
        found, name = get_object(part["_target_"]), part["_target_"].removeprefix("var.")
        fields = {field.name: field for field in dataclasses.fields(found)} if dataclasses.is_dataclass(found) else {}
        for key, parameter in imported(found).items():
            if (name, key) in NOT_IN_YAML or (parameter.kind is parameter.POSITIONAL_OR_KEYWORD and key == "params"):
                continue
            assert key in part, f"{path.stem}: {name}.{key} cannot be overridden without a plus sign"
            if parameter.default is parameter.empty or "${" in str(part[key]):
                continue
            made = fields[key].default_factory if key in fields else dataclasses.MISSING
            default = parameter.default if made is dataclasses.MISSING else made()
            default = list(default) if isinstance(default, tuple) else default
            same = default == part[key] or dataclasses.is_dataclass(default)
            message = (
                f"{path}: {key} is {part[key]!r} and the Python default of {name} is {default!r}. Make them equal, "
            )
            assert same or key in VARIANTS.get(name, ()), message + "remove the Python default, or add it to VARIANTS."
