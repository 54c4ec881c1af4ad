"""A signature read from source is the imported one, and entry points tell a configuration's errors by it alone."""

import importlib
import re
import subprocess
import sys
import types
import typing
from inspect import Signature
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_object

from tests.helpers.runs import ROOT
from var.config.check import EVAL, FOLDER, TRAIN
from var.config.signatures import imported, read

NAMES = {n for p in Path(FOLDER).rglob("*.yaml") for n in re.findall(r"_target_: (\S+)", p.read_text())}
NAMES |= {*TRAIN.values(), *EVAL.values()}


def seen(hint: Any) -> Any:
    """A hint as var.config.check.fits sees it: what refuses no value is Any."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ("one of", arguments)
    if origin in (typing.Union, types.UnionType):
        options = frozenset(map(seen, arguments))
        return Any if Any in options else options
    if origin in (list, tuple):
        return ("each", seen(arguments[0])) if arguments else "several"
    return hint if hint in (bool, int, float, str, type(None)) else Any


def facts(signature: Signature) -> list[tuple[Any, ...]]:
    return [(p.name, p.kind, p.default is p.empty, seen(p.annotation)) for p in signature.parameters.values()]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_source_says_what_an_import_says(name: str) -> None:
    """None would be right, and slow: the entry point would import it."""
    signature = read(name)
    assert signature is not None
    assert facts(signature) == facts(imported(get_object(name)))


BASE = """
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Union

Kind = Literal["a", "b"]
Sizes = Union[int, list[int]]
Tree = dict[str, "Tree"] | list["Tree"]

class Plain:
    shared = 3
    def __init__(self, one: Kind, /, two: "Kind | None" = None, *rest: int, three: float, **more: str): ...

@dataclass
class Data:
    first: int
    constant: "ClassVar[int]" = 1
    second: Kind = "a"
    hidden: int = field(default=0, init=False)
"""
MODULE = """
from __future__ import annotations

import dataclasses
import typing as t
from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import Annotated, Any, ClassVar, Generic, Optional, TypeVar

from . import base
from .base import Data, Kind as Sort, Plain, Sizes, Tree
from .base import Plain as Renamed

T = TypeVar("T")
twice = 1
twice = 2

class Child(Plain, ABC):
    pass

class Empty(Generic[T]):
    pass

@dataclasses.dataclass(order=True)
class Fields(Data, ABC):
    constant: ClassVar[int] = 1
    third: Optional[Sort] = None
    second: int = 3
    made: list[int] = field(default_factory=list)
    only: Annotated[int, "metres"] = field(kw_only=True)
    temporary: InitVar[int] = 0
    _: KW_ONLY
    last: t.Union[Sizes, None]
    literal: t.Literal["x", 1, None]

class Undecorated(Fields):
    extra: int = 0

@dataclass(kw_only=True)
class Odd:
    call: Callable[[int], str]
    sequence: Sequence[int]
    pair: tuple[int, Plain] | None
    nothing: tuple[()]
    far: base.Kind
    tree: Tree
    bare: list | None

@dataclass(init=False)
class Own(Data):
    third: int
    def __init__(self, other: t.Optional[int]): ...

@dataclass(init=False)
class Bare(Data):
    third: int

def function(a, b: Sort = "a", *, c: tuple[float, ...] = ()) -> int: ...
"""
UNCLEAR = """
import functools
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from . import module
from .base import *

class Meta(type):
    def __call__(cls, x: int): ...

class WithMeta(metaclass=Meta):
    def __init__(self, y): ...

class BelowMeta(WithMeta):
    def __init__(self, y): ...

class New:
    def __new__(cls, x: int): ...

class Tuple(NamedTuple):
    x: int

class Mapping(dict): ...

class Promise(Protocol): ...

class Two(module.Plain, module.Empty): ...

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

alias = Again

class bytes(bytes): ...

class Starred:
    def __init__(*given: int): ...

@dataclass
@(lambda cls: cls)
class Doubly: ...
partial = functools.partial(print)

@dataclass
class Inherits(module.Data):
    second: int

@dataclass
class Property:
    size: int
    @property
    def size(self): ...

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


def test_each_form_of_a_parameter(package: str) -> None:
    inside = ["Child", "Empty", "Fields", "Undecorated", "Odd", "Own", "Bare", "function", "Data", "Plain", "Renamed"]
    names = [f"{package}.Data", *(f"{package}.module.{name}" for name in inside)]
    signatures = {name: read(name) for name in names}
    assert package not in sys.modules
    for name, signature in signatures.items():
        assert signature is not None, name
        assert facts(signature) == facts(imported(get_object(name))), name


def test_what_the_source_cannot_say_is_none(package: str) -> None:
    unclear = (
        "WithMeta BelowMeta New Tuple Mapping Promise Two decorated Wrapped Conditional Again alias bytes Starred "
        "Doubly partial Inherits Property Branch Computed Data absent"
    )
    assert [name for name in unclear.split() if read(f"{package}.odd.{name}")] == []
    there = set(vars(importlib.import_module(f"{package}.odd")))
    assert set(unclear.split()) - there == {"absent"}
    for name in ("", "x", ".x", f"{package}.base", f"{package}.none.X", "builtins.dict", "math.gcd", "nowhere.X"):
        assert read(name) is None, name


@pytest.mark.parametrize(
    ("command", "overrides", "lines"),
    [
        *(
            (
                command, [given, "trainer.max_steps=a", "optim.optimizer.eps=a", "loss.temperature=a"],
                ["trainer.max_steps: 'a' is no int", "optimizer.eps: 'a' is no float", "temperature: 'a' is no float"],
            )
            for command, given in [("train", "runs=runs"), ("annotate", "runs=runs"), ("sample", "out=x.jsonl")]
        ),
        ("eval", ["prompts=a", "reward=classifier"], ["prompts: 'a' is no int | None", "reward.path: must be given"]),
    ],
)  # fmt: skip
def test_an_error_is_told_before_torch_is_imported(
    command: str, overrides: list[str], lines: list[str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / f"{command}.py", *overrides],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    for line in lines:
        assert line in done.stderr
    modules = set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, flags=re.M))
    assert "var.config.signatures" in modules
    assert modules & {"torch", "lightning", "transformers", "datasets", "numpy", "var.training.run"} == set()
