"""Carry a function into another process as source: its text and that of all it refers to.

A notebook's functions cannot be imported from another process, and pickle carries no kernel. So what a function refers
to by name is followed: functions, kernels and classes of the notebook are written out, constants as `name = value`,
and what lives in a module that the other process can import is imported there.
"""

import ast
import cmath
import functools
import inspect
import linecache
import os
import pickle
import symtable
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CellType, FunctionType, ModuleType

from fastkit.errors import FastkitError


@dataclass(frozen=True)
class Piece:
    """Lines of a Source that were taken from a file: `line` there became `at` in the text, counted from 1."""

    name: str  # of the function or class
    at: int
    length: int
    file: str  # a path, or the name under which the notebook knows a cell
    line: int


@dataclass(frozen=True)
class Source:
    """Python source that defines `entry_name` and all that it needs."""

    text: str
    entry_name: str
    pieces: tuple[Piece, ...] = ()

    def piece(self, line: int) -> Piece | None:
        """The piece that holds `line` of the text; None for an import or a constant."""
        return next((piece for piece in self.pieces if piece.at <= line < piece.at + piece.length), None)

    def origin(self, line: int) -> tuple[str, int] | None:
        """(file, line) that `line` of the text was taken from; None for an import or a constant."""
        piece = self.piece(line)
        return piece and (piece.file, piece.line + line - piece.at)

    def where(self, line: int) -> str:
        """`line` of the text in the words of its author: 'add.py line 7: x = tl.load(x_ptr)'."""
        lines = self.text.splitlines()
        code = lines[line - 1].strip() if 0 < line <= len(lines) else ""
        file, number = self.origin(line) or ("", line)
        return f"{_readable(file)} line {number}: {code}".strip()

    def load(self, filename: str = "<carried>") -> Callable:
        """Run the text here and return the function. `inspect` finds the source under `filename`, as Triton must."""
        lines = self.text.splitlines(keepends=True)
        linecache.cache[filename] = (len(self.text), None, lines, filename)
        module = sys.modules["carried"] = ModuleType("carried")  # dataclasses look for their module there
        exec(compile(self.text, filename, "exec"), vars(module))
        if not hasattr(module, self.entry_name):
            raise NameError(f"it defines no function {self.entry_name}")
        return getattr(module, self.entry_name)


def carry(function: Callable, express: Callable[[object], str | None] = lambda value: None) -> Source:
    """The source of `function`: a Python function or lambda, or a Triton kernel (jit, interpreted, autotuned, Gluon).

    express  may give a Python expression for values that have none here, such as a tensor; None leaves the value be.

    Raises FastkitError where the source of something cannot be found or a value cannot be carried, and names it.
    """
    return _Carrier(express).carry(function)


def read(text: str, entry_name: str, file: str = "") -> Source:
    """`text` as the Source of its function `entry_name`; `file` is where it came from."""
    return Source(text, entry_name, (Piece(entry_name, 1, len(text.splitlines()), file, 1),))


def child_environment(**settings: str) -> dict[str, str]:
    """The environment of a process that can import all that this one can, with `settings` in it."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)} | settings


class _Carrier:
    def __init__(self, express):
        self.express = express
        self.imports = []
        self.chunks = []  # (text, name, file, line), each after those that it needs when it is run
        self.bound = {}  # each name of the text and the object that it means there
        self.user = "the function"  # whose names are being followed, for messages

    def carry(self, function) -> Source:
        plain = _plain(function)
        if plain is None:
            raise FastkitError(f"expected a function, got {_kind(function)}: give one that was defined with def")
        entry_name = self.user = "carried_lambda" if plain.__name__ == "<lambda>" else plain.__name__
        self.bind(entry_name, function)
        text, pieces = "".join(f"{line}\n" for line in dict.fromkeys(self.imports)), []
        for chunk, name, file, line in self.chunks:
            text += "\n" * (2 if file else 0)
            if file:
                pieces.append(Piece(name, text.count("\n") + 1, chunk.count("\n"), file, line))
            text += chunk
        return Source(text, entry_name, tuple(pieces))

    def bind(self, name: str, value) -> None:
        """See to it that `name` means `value` in the text."""
        if name in self.bound:
            if not _same(self.bound[name], value):
                raise FastkitError(f"{self.user} needs two different things that are named {name}: rename one of them")
            return
        self.bound[name] = value
        plain = _plain(value)
        if statement := _import(name, value):
            self.imports.append(statement)
        elif plain is not None:
            self.bind_function(name, value, plain)
        elif isinstance(value, type):
            if value.__name__ == name:
                self.write_out(name, *_class_source(value, self.user), functools.partial(_global, value))
            else:
                self.bind(value.__name__, value)
                self.write_line(f"{name} = {value.__name__}")
        else:
            self.bind_constant(name, value)

    def bind_function(self, name: str, value, plain: FunctionType) -> None:
        own_name = name if plain.__name__ == "<lambda>" else plain.__name__
        text, file, line = _lambda_source(name, plain) if plain.__name__ == "<lambda>" else _function_source(plain)
        definition = ast.parse(text).body[0]
        # add = triton.jit(_add): the source of _add does not show what add is
        made_later = value is not plain and not getattr(definition, "decorator_list", [])
        if made_later and type(value).__name__ not in ("JITFunction", "InterpretedFunction"):
            raise FastkitError(f"{name} is {_kind(value)} made of {own_name}: decorate {own_name} with @ instead")
        if own_name == name:
            self.write_out(name, text, file, line, functools.partial(_global, plain))
        else:
            self.bind(own_name, plain if made_later else value)
        if made_later:
            self.imports.append("import triton")
            self.write_line(f"{name} = triton.jit({own_name})")
        elif own_name != name:
            self.write_line(f"{name} = {own_name}")

    def bind_constant(self, name: str, value) -> None:
        expression, needed = _expression(value)
        expression = expression or self.express(value)
        if expression is None:
            raise FastkitError(
                f"{self.user} uses {name}, {_kind(value)}, which cannot be carried into another process: "
                "make it an argument, or build it in the function"
            )
        self.imports += needed
        self.write_line(f"{name} = {expression}")

    def write_line(self, line: str) -> None:
        self.chunks.append((f"{line}\n", "", "", 0))

    def write_out(self, name, text, file, line, lookup) -> None:
        """Add `text`, after all that its global names mean; `lookup` raises KeyError for a name that means nothing."""
        user, self.user = self.user, name
        for used in _global_names(text):
            try:
                value = lookup(used)
            except KeyError:
                continue  # a builtin, or a name that the function would not find either
            self.bind(used, value)
            if isinstance(value, ModuleType):
                self.imports += _submodules(text, used, value)
        self.user = user
        self.chunks.append((text, name, file, line))


def _plain(value) -> FunctionType | None:
    """The Python function inside kernels, autotuners and wrappers; None if there is none."""
    for _ in range(20):  # @autotune over @heuristics over @jit
        if isinstance(value, ModuleType | type):
            return None
        if isinstance(value, FunctionType):
            return inspect.unwrap(value)
        value = getattr(value, "fn", None) or getattr(value, "__wrapped__", None)
    return None


def _same(one, other) -> bool:
    expression, _ = _expression(one)
    return one is other or (expression is not None and expression == _expression(other)[0])


def _global(owner: FunctionType | type, name: str):
    """What `name` means inside a function or class, other than a builtin. Raises KeyError if nothing."""
    functions = [owner] if isinstance(owner, FunctionType) else [*filter(None, map(_plain, vars(owner).values()))]
    for function in functions:
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        if name in cells and cells[name] != CellType():
            return cells[name].cell_contents
    return (functions[0].__globals__ if functions else vars(sys.modules[owner.__module__]))[name]


def _global_names(text: str) -> list[str]:
    """The names that `text`, one definition, takes from its module: in its body, decorators, defaults, annotations."""
    names = []

    def walk(table):
        for symbol in table.get_symbols():
            if symbol.is_global() and symbol.is_referenced():
                names.append(symbol.get_name())
        for child in table.get_children():
            walk(child)

    walk(symtable.symtable(text, "<carried>", "exec"))
    return list(dict.fromkeys(names))


def _submodules(text: str, name: str, module: ModuleType) -> list[str]:
    """Imports of the modules that `text` reaches as attributes of `name`: scipy.special, say, for scipy."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            path = ast.unparse(node).split(".")
            dotted = ".".join([module.__name__, *path[1:]])
            if path[0] == name and dotted in sys.modules:
                found.append(f"import {dotted}")
    return found


def _import(name: str, value) -> str:
    """The statement that imports `value` as `name` in another process, or ""."""
    if isinstance(value, ModuleType):
        if not _findable(value.__name__):
            return ""
        return f"import {name}" if value.__name__ == name else f"import {value.__name__} as {name}"
    named = _plain(value) or value
    own_name = getattr(named, "__name__", None)
    if not isinstance(own_name, str) or not callable(value):
        return ""
    module = getattr(named, "__module__", None) or pickle.whichmodule(named, own_name)
    if not _findable(module) or getattr(sys.modules.get(module), own_name, None) is not value:
        return ""
    return f"from {module} import {own_name}" + (f" as {name}" if name != own_name else "")


def _findable(module: str) -> bool:
    """Whether another process would import this very module: not a notebook, nor a module made from a loose file."""
    top = module.partition(".")[0]
    if top in ("__main__", "carried") or module not in sys.modules or top not in sys.modules:
        return False
    if top in sys.stdlib_module_names:
        return True
    for finder in sys.meta_path:
        spec = getattr(finder, "find_spec", lambda *_: None)(top, None)
        if spec:
            ours = getattr(sys.modules[top], "__spec__", None)
            return bool(ours) and spec.origin == ours.origin
    return False


def _expression(value) -> tuple[str | None, list[str]]:
    """Python for a constant, and the imports that it needs; (None, []) if `value` is not one."""
    if value is None or value is ... or type(value) in (bool, int, str, bytes):
        return repr(value), []
    if type(value) in (float, complex):
        return repr(value) if cmath.isfinite(value) else f"{type(value).__name__}({str(value)!r})", []
    kind = f"{type(value).__module__}.{type(value).__name__}"
    if kind in ("torch.dtype", "torch.layout", "torch.memory_format"):
        return str(value), ["import torch"]
    if kind == "torch.device":
        return f"torch.{value!r}", ["import torch"]
    if kind == "triton.language.core.dtype":
        return repr(value), ["import triton.language"]
    if kind == "triton.language.core.constexpr":
        inner, needed = _expression(value.value)
        return inner and f"triton.language.constexpr({inner})", [*needed, "import triton.language"]
    if type(value) in (tuple, list, set, frozenset, dict):
        items = [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)
        expressions, needs = zip(*map(_expression, items), strict=True) if items else ((), ())
        if None in expressions:
            return None, []
        if isinstance(value, dict):
            half = len(value)
            pairs = zip(expressions[:half], expressions[half:], strict=True)
            text = "{" + ", ".join(f"{key}: {item}" for key, item in pairs) + "}"
        elif isinstance(value, tuple):
            text = "(" + "".join(f"{item}, " for item in expressions) + ")"
        else:
            text = f"[{', '.join(expressions)}]"
            text = text if type(value) is list else f"{type(value).__name__}({text})"
        return text, [line for need in needs for line in need]
    return None, []


def _function_source(function: FunctionType) -> tuple[str, str, int]:
    """(text, file, line) of a function, its decorators with it."""
    if "." in function.__qualname__.rpartition("<locals>.")[2]:
        raise FastkitError(f"{function.__qualname__} is a method: give a function defined with def outside a class")
    try:
        lines, line = inspect.getsourcelines(function)
    except (OSError, TypeError) as error:
        raise _no_source(function.__name__) from error
    return _closed("".join(lines)), function.__code__.co_filename, max(line, 1)


def _lambda_source(name: str, function: FunctionType) -> tuple[str, str, int]:
    """(text, file, line) of `name = lambda ...`, found among the file's lambdas by the place of its code."""
    file = function.__code__.co_filename
    text = "".join(linecache.getlines(file))
    body = [place for place in function.__code__.co_positions() if None not in place and place[3] > 0]
    if not text or not body:
        raise _no_source("a lambda")
    last = max((place[1], place[3]) for place in body)
    found = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Lambda) and (node.body.end_lineno, node.body.end_col_offset) == last
    ]
    if not found:
        raise _no_source("a lambda")
    return f"{name} = ({ast.get_source_segment(text, found[0])})\n", file, found[0].lineno


def _class_source(cls: type, user: str) -> tuple[str, str, int]:
    """(text, file, line) of a class, by way of its methods where `inspect` does not know the notebook's cell."""
    try:
        lines, line = inspect.getsourcelines(cls)
        return _closed("".join(lines)), inspect.getsourcefile(cls), max(line, 1)
    except (OSError, TypeError):
        pass
    for method in filter(None, map(_plain, vars(cls).values())):
        file = method.__code__.co_filename
        text = "".join(linecache.getlines(file))
        for node in ast.walk(ast.parse(text)):
            inside = isinstance(node, ast.ClassDef) and node.lineno <= method.__code__.co_firstlineno <= node.end_lineno
            if inside and node.name == cls.__name__:
                start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                return _closed("".join(text.splitlines(True)[start - 1 : node.end_lineno])), file, start
    raise FastkitError(f"{user} uses the class {cls.__name__}, whose source cannot be found: do without it")


def _closed(text: str) -> str:
    return textwrap.dedent(text).rstrip("\n") + "\n"


def _no_source(name: str) -> FastkitError:
    return FastkitError(f"the source of {name} cannot be found: define it in a notebook's cell or in a file")


def _kind(value) -> str:
    shape = getattr(value, "shape", None)
    name = type(value).__name__
    return (
        ("an " if name[0] in "AEIOaeio" else "a ") + name + (f" of shape {tuple(shape)}" if shape is not None else "")
    )


def _readable(file: str) -> str:
    """A file's name as its author knows it: the last part of a path, In[3] for the cell of a notebook."""
    ipython = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    kind_and_name = ipython and ipython.compile.format_code_name(file)
    return kind_and_name[1] if kind_and_name else Path(file).name
