"""Signatures of classes and functions by dotted name, read from their source: importing torch would take seconds.

Both `read` and `imported` give an inspect.Signature whose annotations are evaluated hints; where there is none it is
Any. tests/test_signatures.py holds the two alike.
"""

import ast
import builtins
import functools
import importlib.util
import inspect
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from inspect import Parameter
from pathlib import Path
from typing import Any

# Names are followed up to these modules. Of the hints made of them these can refuse a value; any other is read as Any.
ENDS = ("builtins", "typing", "typing_extensions", "dataclasses", "abc")


HINTS: dict[str, Any] = {
    **{f"builtins.{name}": getattr(builtins, name) for name in ("bool", "int", "float", "str", "list", "tuple")},
    **{f"typing.{name}": getattr(typing, name) for name in ("Literal", "Union", "Optional", "List", "Tuple")},
}


PLAIN_BASES = {"builtins.object", "abc.ABC", "typing.Generic"}  # they change no signature


Class = tuple[ast.ClassDef, "Module"]


class Unclear(Exception):
    """The source alone cannot say: a decorator, a metaclass, a name that is bound twice, no source."""


@dataclass(frozen=True)
class Module:
    """A parsed module. bound: its names, each with its statement; None where it is bound twice or under a condition."""

    name: str
    package: str
    bound: Mapping[str, ast.stmt | None]


def imported(target: Any) -> inspect.Signature:
    """The signature of a class or function that is at hand."""
    signature = inspect.signature(target)
    hints: dict[str, Any] = {}
    if signature.parameters:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    return signature.replace(
        parameters=[p.replace(annotation=hints.get(name, Any)) for name, p in signature.parameters.items()]
    )


def read(name: str) -> inspect.Signature | None:
    """The signature of what stands under this dotted name; a default is None, whatever it is.

    None: the source alone cannot say, or there is no such thing. Nothing is imported.
    """
    try:
        node, module = _definition(name)
        if isinstance(node, ast.FunctionDef):
            return inspect.Signature(_parameters(node, module))
        return _constructor((node, module)) if isinstance(node, ast.ClassDef) else None
    except Unclear:
        return None


@functools.cache
def _module(name: str) -> Module | None:
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)  # imports nothing, as of a dotted name it would: the parents
        for depth, _ in enumerate(rest, 1):
            if spec is None or spec.submodule_search_locations is None:
                return None
            full = ".".join((top, *rest[:depth]))
            spec = PathFinder.find_spec(full, list(spec.submodule_search_locations))
        if spec is None or not spec.has_location or not str(spec.origin).endswith(".py"):
            return None
        tree = ast.parse(Path(str(spec.origin)).read_bytes())
    except (ImportError, KeyError, OSError, SyntaxError, ValueError):
        return None
    return Module(name, spec.parent or "", _bound(tree.body))


def _bound(body: Sequence[ast.stmt]) -> dict[str, ast.stmt | None]:
    bound: dict[str, ast.stmt | None] = {}
    for name, statement in _bindings(body):
        bound[name] = None if name in bound else statement
    return bound


def _bindings(body: Sequence[ast.stmt]) -> Iterator[tuple[str, ast.stmt | None]]:
    """Each name that is bound, with its statement; None, and rather too many, of what stands under a condition."""
    for statement in body:
        match statement:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name, statement
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                yield name, statement
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                yield from ((alias.asname or alias.name.partition(".")[0], statement) for alias in names)
            case _:
                for node in ast.walk(statement):
                    match node:
                        case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                            yield name, None
                        case ast.Name(id=name, ctx=ast.Store()):
                            yield name, None
                        case ast.alias(name=name, asname=other):
                            yield other or name.partition(".")[0], None


def _absolute(name: str, module: Module) -> str:
    """The full dotted name of what a module calls `name`."""
    first, _, rest = name.partition(".")
    if first not in module.bound:
        return f"builtins.{name}" if hasattr(builtins, first) else ""
    statement = module.bound[first]
    if isinstance(statement, ast.Import):
        full = next((alias.name for alias in statement.names if alias.asname == first), first)
    else:
        full = _origin(f"{module.name}.{first}")
    return _origin(f"{full}.{rest}" if rest else full)


def _origin(name: str) -> str:
    """The full dotted name under which a thing is defined; what other modules import of it is followed."""
    seen = set()
    while name not in seen:
        seen.add(name)
        home, _, attribute = name.rpartition(".")
        if home in ENDS:
            return name.replace("typing_extensions.", "typing.")
        module = _module(home)
        statement = module.bound.get(attribute) if module else None
        if module is None or not isinstance(statement, ast.ImportFrom):
            return name
        try:
            source = importlib.util.resolve_name("." * statement.level + (statement.module or ""), module.package)
        except ImportError:
            return name
        there = next(alias.name for alias in statement.names if attribute == (alias.asname or alias.name))
        name = f"{source}.{there}"
    return name


def _definition(name: str) -> tuple[ast.stmt, Module]:
    home, _, attribute = _origin(name).rpartition(".")
    module = _module(home) if home not in ENDS else None
    statement = module.bound.get(attribute) if module else None
    if module is None or statement is None:
        raise Unclear
    return statement, module


def _parameters(node: ast.FunctionDef, module: Module) -> list[Parameter]:
    if node.decorator_list:
        raise Unclear
    of, out = node.args, list[Parameter]()

    def add(argument: ast.arg, kind: Any, default: ast.expr | None = None) -> None:
        out.append(_parameter(argument.arg, kind, argument.annotation, module, default is not None))

    positional = [*of.posonlyargs, *of.args]
    absent = [None] * (len(positional) - len(of.defaults))
    for place, (argument, default) in enumerate(zip(positional, [*absent, *of.defaults], strict=True)):
        only = place < len(of.posonlyargs)
        add(argument, Parameter.POSITIONAL_ONLY if only else Parameter.POSITIONAL_OR_KEYWORD, default)
    if of.vararg:
        add(of.vararg, Parameter.VAR_POSITIONAL)
    for argument, default in zip(of.kwonlyargs, of.kw_defaults, strict=True):
        add(argument, Parameter.KEYWORD_ONLY, default)
    if of.kwarg:
        add(of.kwarg, Parameter.VAR_KEYWORD)
    return out


def _parameter(name: str, kind: Any, annotation: ast.expr | None, module: Module, default: bool) -> Parameter:
    try:
        hint = Any if annotation is None else _hint(annotation, module)
    except (TypeError, ValueError):  # what cannot be evaluated
        hint = Any
    return Parameter(name, kind, annotation=hint, default=None if default else Parameter.empty)


def _constructor(of: Class) -> inspect.Signature:
    line = _line(of)
    for depth, (node, module) in enumerate(line):
        bound = _bound(node.body)
        if "__init__" in bound:
            init = bound["__init__"]
            if not isinstance(init, ast.FunctionDef) or not (init.args.posonlyargs or init.args.args):
                raise Unclear
            return inspect.Signature(_parameters(init, module)[1:])
        options = _dataclass(node, module)
        if options is not None and _flag(options, "init", True):
            return inspect.Signature(_fields(line[depth:]))
    return inspect.Signature()


def _line(of: Class) -> list[Class]:
    """The class, its base, the base's base, …"""
    node, module = of
    if node.keywords or {"__new__", "__signature__"} & set(_bound(node.body)):
        raise Unclear
    _dataclass(node, module)
    bases = [_absolute(_outer(base), module) for base in node.bases]
    bases = [base for base in bases if base not in PLAIN_BASES]
    if len(bases) > 1:
        raise Unclear
    if not bases:
        return [of]
    base, home = _definition(bases[0])
    if not isinstance(base, ast.ClassDef) or base is node:
        raise Unclear
    return [of, *_line((base, home))]


def _dataclass(node: ast.ClassDef, module: Module) -> list[ast.keyword] | None:
    """The options of the decorator @dataclass; None: there is none. Another decorator may do anything."""
    if not node.decorator_list:
        return None
    decorator = node.decorator_list[0]
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    if len(node.decorator_list) > 1 or _absolute(_outer(called), module) != "dataclasses.dataclass":
        raise Unclear
    return decorator.keywords if isinstance(decorator, ast.Call) else []


def _flag(options: list[ast.keyword], name: str, otherwise: bool) -> bool:
    for option in options:
        if option.arg in (None, name):
            if not isinstance(option.value, ast.Constant):
                raise Unclear
            return bool(option.value.value)
    return otherwise


def _fields(line: list[Class]) -> list[Parameter]:
    """What the generated __init__ of a dataclass takes: the fields of its bases first."""
    fields: dict[str, Parameter | None] = {}
    inherited: set[str] = set()
    for node, module in reversed(line):
        bound = _bound(node.body)
        options = _dataclass(node, module)
        if options is not None:
            if None in bound.values():  # perhaps a field
                raise Unclear
            keyword_only = _flag(options, "kw_only", False)
            for statement in node.body:
                if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                    continue
                name, value, default = statement.target.id, statement.value, statement.value is not None
                outer = _absolute(_outer(statement.annotation), module)
                if outer == "typing.ClassVar":
                    continue
                if outer == "dataclasses.KW_ONLY":
                    keyword_only = True
                    continue
                # a field without a value takes what the class has under its name as its default
                if value is None and name in inherited:
                    raise Unclear
                settings: list[ast.keyword] = []
                if isinstance(value, ast.Call) and _absolute(_outer(value.func), module) == "dataclasses.field":
                    settings = value.keywords
                    default = any(s.arg in ("default", "default_factory") for s in settings)
                named = _flag(settings, "kw_only", keyword_only)
                kind = Parameter.KEYWORD_ONLY if named else Parameter.POSITIONAL_OR_KEYWORD
                init = _flag(settings, "init", True)
                fields[name] = _parameter(name, kind, statement.annotation, module, default) if init else None
        inherited |= bound.keys()
    return sorted((p for p in fields.values() if p), key=lambda p: p.kind)


def _outer(node: ast.expr) -> str:
    """The dotted name before any brackets: Literal of Literal["a"]; empty for what is no name."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        node = _parsed(node.value)
    while isinstance(node, ast.Subscript):
        node = node.value
    text = ast.unparse(node)
    return text if text.replace(".", "").isidentifier() else ""


def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        return ast.Constant(0)  # no type


def _hint(node: ast.expr, module: Module, within: frozenset[str] = frozenset()) -> Any:
    """An annotation's value as far as it can refuse one. within: the aliases that lead here, which may be recursive."""
    match node:
        case ast.Constant(value=None):
            return type(None)
        case ast.Constant(value=builtins.Ellipsis):
            return ...
        case ast.Constant(value=str(text)):
            return _hint(_parsed(text), module, within)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _hint(left, module, within) | _hint(right, module, within)
        case ast.Subscript(value=of, slice=inner):
            parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            if _absolute(_outer(of), module) == "typing.Annotated":
                return _hint(parts[0], module, within)
            form = _hint(of, module, within)
            if form is Any:
                return Any
            inside = tuple(
                ast.literal_eval(part) if form is typing.Literal else _hint(part, module, within) for part in parts
            )
            return form[inside[0] if len(inside) == 1 else inside]
        case ast.Name() | ast.Attribute():
            name = _absolute(_outer(node), module)
            if name in HINTS or name in within:
                return HINTS.get(name, Any)
            try:
                statement, home = _definition(name)
            except Unclear:
                return Any
            if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
                return _hint(statement.value, home, within | {name})
    return Any
