"""Read the parameters of a class from its source, without importing it.

Importing torch takes seconds, so a command first checks its configuration against the source. `read` rebuilds a
class from its fields, its `__init__` and its bases. If the source is not clear enough it returns None, and the caller
falls back to `imported`. An annotation that needs an import is Any, which accepts every value.
"""

import abc
import ast
import builtins
import dataclasses
import functools
import importlib.util
import inspect
import types
import typing
from collections.abc import Mapping
from importlib.machinery import PathFinder
from inspect import Parameter
from pathlib import Path
from typing import Any, NamedTuple

Parameters = Mapping[str, Parameter]

# What annotations, bases and decorators may use. Any other name that the source does not define is Any.
KNOWN: dict[str, Any] = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}
KNOWN |= {name: getattr(module, name) for module in (typing, dataclasses) for name in module.__all__}
KNOWN |= {"ABC": abc.ABC, "abc": abc, "dataclasses": dataclasses, "typing": typing}
NONE = ast.Constant(None)  # replaces default values: all that matters is whether there is one


class Module(NamedTuple):
    """A parsed module."""

    name: str
    package: str  # where relative imports start
    names: dict[str, Any]  # the statement that binds each name; None if there are several


def imported(target: Any) -> Parameters:
    """Return the parameters of an imported class or function, with evaluated annotations."""
    parameters = inspect.signature(target).parameters
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target) if parameters else {}
    return {name: p.replace(annotation=hints.get(name, Any)) for name, p in parameters.items()}


def read(name: str) -> Parameters | None:
    """Return the parameters of the class with this dotted name, or None if the source does not determine them."""
    try:
        return inspect.signature(_build(*_find(name))).parameters
    except Exception:  # if something is wrong, importing shows it
        return None


@functools.cache
def _module(name: str) -> Module:
    parts = name.split(".")
    spec: Any = importlib.util.find_spec(parts[0])  # of a dotted name, find_spec would import the parents
    for depth in range(2, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:depth]), spec.submodule_search_locations or [])
    names: dict[str, Any] = {}
    for statement in ast.parse(Path(spec.origin).read_bytes()).body:
        bound: list[str] = []
        match statement:
            case ast.ClassDef(name=found) | ast.FunctionDef(name=found) | ast.Assign(targets=[ast.Name(id=found)]):
                bound = [found]
            case ast.ImportFrom(names=aliases):
                bound = [alias.asname or alias.name for alias in aliases]
        names |= {name: None if name in names else statement for name in bound}
    return Module(name, spec.parent, names)


def _find(name: str) -> tuple[Any, Module]:
    """Return the statement that defines a dotted name, and its module. Follow `from x import y`."""
    home, _, attribute = name.rpartition(".")
    module = _module(home)
    node = module.names[attribute]
    return _find(_follow(attribute, module)) if isinstance(node, ast.ImportFrom) else (node, module)


def _follow(name: str, module: Module) -> str:
    """Return the dotted name of what a module imports under `name`."""
    node = module.names[name]
    source = importlib.util.resolve_name("." * node.level + (node.module or ""), module.package)
    return f"{source}.{next(alias.name for alias in node.names if name == (alias.asname or alias.name))}"


def _build(node: ast.ClassDef, module: Module) -> Any:
    """Build a class with the same constructor. Raise an error if the source is not clear enough."""
    body: dict[str, Any] = {"__annotations__": {}, "__module__": __name__}
    for statement in node.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=value):
                body["__annotations__"][name] = _hint(annotation, module)
                if value is not None:
                    body[name] = _default(value)
            case ast.FunctionDef(name="__init__", decorator_list=[]):
                body["__init__"] = _initializer(statement, module)
            case ast.FunctionDef(name="__init__" | "__new__") | ast.If() | ast.Try():
                raise ValueError(node.name)
    if node.keywords:  # a metaclass
        raise ValueError(node.name)
    bases = () if "__init__" in body else tuple(_base(base, module) for base in node.bases)
    built: Any = types.new_class(node.name, bases, {}, lambda namespace: namespace.update(body))
    for decorator in node.decorator_list:
        called, keywords = (decorator.func, decorator.keywords) if isinstance(decorator, ast.Call) else (decorator, [])
        if _evaluate(called, module) is not dataclasses.dataclass:
            raise ValueError(node.name)
        built = dataclasses.dataclass(**{str(k.arg): ast.literal_eval(k.value) for k in keywords})(built)
    return built


def _base(node: ast.expr, module: Module) -> Any:
    if isinstance(node, ast.Attribute) and (imported_module := ast.unparse(node.value)) in module.names:
        return _build(*_find(f"{_follow(imported_module, module)}.{node.attr}"))
    if isinstance(node, ast.Subscript) and _evaluate(node.value, module) in (typing.Generic, typing.Protocol):
        return object  # it does not change the constructor
    base = _evaluate(node, module)
    return _build(*_find(f"{module.name}.{ast.unparse(node)}")) if base is Any else base


def _default(value: ast.expr) -> Any:
    if not isinstance(value, ast.Call) or ast.unparse(value.func) not in ("field", "dataclasses.field"):
        return None
    options = {str(k.arg): NONE if "default" in str(k.arg) else k.value for k in value.keywords if k.arg != "metadata"}
    return dataclasses.field(**{name: ast.literal_eval(option) for name, option in options.items()})


def _initializer(node: ast.FunctionDef, module: Module) -> Any:
    """Return an `__init__` with the same signature and no body."""
    of, positional = node.args, [*node.args.posonlyargs, *node.args.args]
    first_default = len(positional) - len(of.defaults)
    parameters = list[Parameter]()

    def add(argument: ast.arg | None, kind: Any, default: bool = False) -> None:
        if argument is not None:
            hint, value = _hint(argument.annotation, module), None if default else Parameter.empty
            parameters.append(Parameter(argument.arg, kind, annotation=hint, default=value))

    for place, argument in enumerate(positional):
        only = place < len(of.posonlyargs)
        kind = Parameter.POSITIONAL_ONLY if only else Parameter.POSITIONAL_OR_KEYWORD
        add(argument, kind, default=place >= first_default)
    add(of.vararg, Parameter.VAR_POSITIONAL)
    for argument, value in zip(of.kwonlyargs, of.kw_defaults, strict=True):
        add(argument, Parameter.KEYWORD_ONLY, default=value is not None)
    add(of.kwarg, Parameter.VAR_KEYWORD)

    def __init__(*_: Any, **__: Any) -> None: ...

    __init__.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return __init__


def _hint(annotation: ast.expr | None, module: Module) -> Any:
    try:
        hint = _evaluate(annotation, module) if annotation else Any
        return _hint(ast.parse(hint, mode="eval").body, module) if isinstance(hint, str) else hint
    except Exception:  # for example Tensor[int], where Tensor is Any
        return Any


def _evaluate(node: ast.expr, module: Module) -> Any:
    """Return the value of an annotation, base or decorator made of known types. Nothing else is evaluated."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return _look_up(name, module)
        case ast.Attribute(value=ast.Name(id="abc" | "dataclasses" | "typing" as name), attr=attribute):
            return getattr(_look_up(name, module), attribute)
        case ast.Subscript(value=of, slice=ast.Tuple(elts=parts)):
            return _evaluate(of, module)[tuple(_evaluate(part, module) for part in parts)]
        case ast.Subscript(value=of, slice=part):
            return _evaluate(of, module)[_evaluate(part, module)]
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _evaluate(left, module) | _evaluate(right, module)
    return Any


def _look_up(name: str, module: Module) -> Any:
    """Return the value of a module's name: a known type, or an alias of known types. The value of any other is Any."""
    if name in KNOWN and isinstance(module.names.get(name), ast.ImportFrom | None):
        return KNOWN[name]
    try:
        node, home = _find(f"{module.name}.{name}")
        return _evaluate(node.value, home)
    except Exception:  # not an alias
        return Any
