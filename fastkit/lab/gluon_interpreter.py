"""Gluon in Triton's interpreter, as far as addresses need it: layouts are ignored, shared memory is a variable.

Gluon has no interpreter of its own. Its kernels are Triton's but for layouts, which move no element to another address,
and for shared memory. What moves tiles asynchronously (TMA, mbarriers, warp specialisation) is not covered.
"""

from contextlib import contextmanager
from types import ModuleType
from unittest import mock

from fastkit.errors import FastkitError
from fastkit.lab.sources import carry


class Uninterpretable(FastkitError):
    """The kernel uses what this interpreter does not know."""


def interpreted(kernel):
    """The kernel of a GluonJITFunction as Triton's interpreter runs it."""
    import triton.language as tl
    from triton.experimental.gluon import language as gl
    from triton.runtime.interpreter import InterpretedFunction

    names = kernel.fn.__globals__
    names.setdefault("tl", tl)  # the interpreter looks for it
    for name, value in list(names.items()):
        if value is gl:
            names[name] = _language(tl, gl)
        elif type(value).__name__ == "GluonJITFunction" and value is not kernel:
            names[name] = interpreted(value)
    return InterpretedFunction(kernel.fn)


def with_constexprs(kernel):
    """`kernel`, an InterpretedFunction, whose "gl.constexpr" are what the interpreter knows as "tl.constexpr"."""
    kinds = kernel.rewrite().__annotations__
    kinds.update({name: "constexpr" for name, kind in kinds.items() if "constexpr" in str(kind)})
    return kernel


@contextmanager
def gluon_on_cpu():
    """Within, launches of Gluon kernels on CPU tensors run, interpreted, where TRITON_INTERPRET=1 has Triton's run so.

    What they compute is right or wrong as on a GPU; that a layout is refused there, or is slow, does not show.
    """
    from triton.experimental.gluon._runtime import GluonJITFunction

    def launch(kernel, grid):
        return with_constexprs(interpreted(carry(kernel).load("<interpreted>")))[grid]

    with mock.patch.object(GluonJITFunction, "__getitem__", launch):
        yield


def _language(tl, gl) -> ModuleType:
    """A stand-in for `gl`: its layouts and types, Triton's functions without their layout arguments."""

    class Language(ModuleType):
        def __getattr__(self, name):
            if isinstance(getattr(gl, name, None), type) or not hasattr(tl, name):
                raise Uninterpretable(f"gl.{name} has no counterpart in Triton's interpreter")
            return getattr(tl, name)

    class SharedMemory:
        def __init__(self, content, order=None):
            self.content, self.order = content, order  # a list of one tile, which views share

        def store(self, value):
            self.content[0] = value if self.order is None else tl.permute(value, _inverse(self.order))

        def load(self, layout=None):
            if self.content[0] is None:
                raise Uninterpretable("shared memory is read before it is written")
            return self.content[0] if self.order is None else tl.permute(self.content[0], self.order)

        def permute(self, order):
            before = self.order or range(len(order))
            return SharedMemory(self.content, tuple(before[i] for i in order))

        def __getattr__(self, name):
            raise Uninterpretable(f"shared memory's .{name} has no counterpart in Triton's interpreter")

    language = Language("gl")
    for name, value in vars(gl).items():  # layouts, types and constants
        if isinstance(value, type) and (name.endswith("Layout") or name in ("constexpr", "tensor")):
            setattr(language, name, value)
    language.arange = lambda start, end, layout=None: tl.arange(start, end)
    language.zeros = lambda shape, dtype, layout=None: tl.zeros(shape, dtype)
    language.full = lambda shape, value, dtype, layout=None: tl.full(shape, value, dtype)
    language.convert_layout = lambda value, layout, assert_trivial=False: value
    language.set_auto_layout = lambda value, layout: value
    language.barrier = language.thread_barrier = lambda: None
    language.allocate_shared_memory = lambda dtype, shape, layout, value=None: SharedMemory([value])
    return language


def _inverse(order):
    return tuple(order.index(i) for i in range(len(order)))
