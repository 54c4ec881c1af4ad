"""Parameters read from source are those of the imported class, and commands report errors before they import torch."""

import importlib
import re
import subprocess
import sys
import time
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_object

from tests.helpers.runs import ROOT
from var.config.check import EVAL, FOLDER, TRAIN
from var.config.signatures import Parameters, imported, read

NAMES = {n for p in Path(FOLDER).rglob("*.yaml") for n in re.findall(r"_target_: ((?:var|torch)[\w.]+)", p.read_text())}
NAMES |= {*TRAIN.values(), *EVAL.values()}


def as_checked(hint: Any) -> Any:
    """Return a hint as var.config.check.fits uses it: Any if it accepts every value."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ("one of", arguments)
    if origin in (typing.Union, types.UnionType):
        options = frozenset(map(as_checked, arguments))
        return Any if Any in options else options
    if origin in (list, tuple):
        return ("each", *map(as_checked, arguments[:1]))
    return hint if hint in (bool, int, float, str, type(None)) else Any


def as_tuples(parameters: Parameters) -> list[tuple[Any, ...]]:
    return [(p.name, p.kind, p.default is p.empty, as_checked(p.annotation)) for p in parameters.values()]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_source_and_import_give_the_same_parameters(name: str) -> None:
    parameters = read(name)
    assert parameters is not None
    assert as_tuples(parameters) == as_tuples(imported(get_object(name)))


BASE = """
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Union

Kind = Literal["a", "b"]
Sizes = Union[int, list[int]]

class Plain:
    shared = 3
    def __init__(self, one: Kind, two: "Kind | None" = None, *rest: int, three: float, **more: str): ...

@dataclass
class Data:
    first: int
    constant: ClassVar[int] = 1
    second: Kind = "a"
    hidden: int = field(default=0, init=False)
"""
MODULE = """
from __future__ import annotations

import dataclasses
from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar, Generic, Optional, Protocol, TypeVar

from . import base
from .base import Data, Kind as Sort, Plain, Sizes

T = TypeVar("T")

class Child(base.Plain, ABC): ...

class Empty(Generic[T]): ...

class Promise(Protocol): ...

@dataclasses.dataclass(order=True)
class Fields(Data, ABC):
    constant: ClassVar[int] = 1
    third: Optional[Sort] = None
    second: int = 3
    made: list[int] = field(default_factory=list)
    only: int = field(kw_only=True)
    _: KW_ONLY
    last: Sizes | None

class Undecorated(Fields):
    extra: int = 0

@dataclass(kw_only=True)
class Odd:
    call: Callable[[int], str]
    sequence: Sequence[int]
    pair: tuple[int, Plain] | None
    bare: list | None

@dataclass
class Inherits(Data):
    second: int

@dataclass(init=False)
class Own(Data):
    third: int
    def __init__(self, other: Optional[int]): ...
"""
UNCLEAR = """
from dataclasses import dataclass

from . import module
from .base import *

class WithMeta(metaclass=type):
    def __init__(self, y): ...

class New:
    def __new__(cls, x: int): ...

def wrapped(function):
    return lambda z: 0

@wrapped
def decorated(x): ...

class Wrapped:
    @wrapped
    def __init__(self, x): ...

if True:
    class Conditional: ...

Again = 1
class Again: ...

alias = New

@dataclass
@(lambda cls: cls)
class Doubly: ...

@dataclass
class Branch:
    if True:
        size: int

@dataclass(**{})
class Computed: ...
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "signed").mkdir()
    for name, text in {"__init__": "from .base import Data\n", "base": BASE, "module": MODULE, "odd": UNCLEAR}.items():
        (tmp_path / "signed" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return "signed"


def test_forms_of_classes(package: str) -> None:
    inside = "Child Empty Promise Fields Undecorated Odd Inherits Own Data Plain"
    names = [f"{package}.Data", *(f"{package}.module.{name}" for name in inside.split())]
    found = {name: read(name) for name in names}
    assert package not in sys.modules
    for name, parameters in found.items():
        assert parameters is not None, name
        expected = as_tuples(imported(get_object(name)))
        assert as_tuples(parameters) == expected, name


def test_unclear_source_gives_none(package: str) -> None:
    unclear = "WithMeta New decorated Wrapped Conditional Again alias Doubly Branch Computed Data absent"
    assert [name for name in unclear.split() if read(f"{package}.odd.{name}")] == []
    assert set(unclear.split()) - set(vars(importlib.import_module(f"{package}.odd"))) == {"absent"}
    for name in ("", "x", ".x", f"{package}.base", f"{package}.none.X", "math.gcd", "nowhere.X"):
        assert read(name) is None, name


CUSTOM = """
import torch

class Loss:
    def __init__(self, beta: float, kind: str = "a"): ...
"""
WRONG = ["trainer.max_steps=a", "optim.optimizer.eps=a", "loss.temperature=a", "+data.limt=3"]
WRONG_LINES = [
    "trainer.max_steps: expected int, got 'a'", "optim.optimizer.eps: expected float, got 'a'",
    "loss.temperature: expected float, got 'a'", "data.limt: nothing reads this key; did you mean limit?",
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "overrides", "lines"),
    [
        ("train", ["runs=runs", *WRONG], WRONG_LINES),
        ("annotate", ["runs=runs", *WRONG], WRONG_LINES),
        ("sample", ["out=x.jsonl", *WRONG], WRONG_LINES),
        ("eval", ["prompts=a", "reward=classifier"], ["prompts: expected int or null", "reward.path: must be given"]),
        (
            "train", ["loss=custom", "loss._target_=mine.Loss", "+loss.bta=1", "+loss.kind=2", "strategy=ddp"],
            ["loss.bta: nothing reads this key; did you mean beta?", "loss.kind: expected str, got 2"],
        ),
    ],
)  # fmt: skip
def test_errors_are_reported_before_torch_is_imported(
    command: str, overrides: list[str], lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(CUSTOM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / f"{command}.py", *overrides],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert time.perf_counter() - start < 10  # about 1 s on an idle machine
    assert done.returncode == 1
    assert [line for line in lines if line not in done.stderr] == []
    modules = set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, flags=re.M))
    assert "var.config.signatures" in modules
    assert modules & {"torch", "lightning", "transformers", "datasets", "numpy", "mine", "var.training.run"} == set()
