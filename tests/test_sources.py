import math
import subprocess
import sys
import textwrap
from types import ModuleType

import pytest
import torch

import fastkit.kernels.swiglu
from fastkit.errors import FastkitError
from fastkit.lab.sources import Source, carry, child_environment, read


def loose(text: str) -> ModuleType:
    """`text` run as a module that no other process can import, as a notebook is."""
    import linecache

    linecache.cache["loose.py"] = (len(text), None, text.splitlines(True), "loose.py")
    module = ModuleType("loose")
    sys.modules["loose"] = module
    exec(compile(text, "loose.py", "exec"), vars(module))
    return module


NOTEBOOK = textwrap.dedent(
    """\
    import math
    from dataclasses import dataclass
    import os.path
    import numpy as np
    import torch
    import triton
    import triton.language as tl
    from math import sqrt as root
    BLOCK = 64
    SCALE = tl.constexpr(2)
    CONSTANTS = (torch.float16, tl.float32, 1.5, -math.inf, {"a": [1, None]}, {2}, "text", 3 + 1j, torch.device("cpu"))

    @dataclass
    class Tiling:
        block: int

        def blocks(self, n):
            return ceil_div(n, self.block)

    @triton.jit
    def scaled(x):
        return x * SCALE

    @triton.jit
    def scale_kernel(x_ptr, n, BLOCK: tl.constexpr):
        cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + cols, mask=cols < n)
        tl.store(x_ptr + cols, scaled(x), mask=cols < n)

    ceil_div = lambda a, b: -(-a // b)
    x = torch.ones(3)

    def scale(x, tiling=Tiling(BLOCK)):
        y = x.clone()
        scale_kernel[(tiling.blocks(x.numel()),)](y, x.numel(), BLOCK=tiling.block)
        return y, [math.floor(root(x)) for x in (4, 9)], CONSTANTS

    def _plus(x):
        return x + SCALE
    plus = triton.jit(_plus)
    both = scale

    def aliases():
        return both, plus

    def is_even(n):
        return n == 0 or is_odd(n - 1)

    def is_odd(n):
        return n != 0 and is_even(n - 1)

    def counted(n):
        def count(m):
            return n + m + BLOCK
        return count

    def joined():
        return os.path.join("a", "b"), np.linalg.norm(np.ones(4))

    def uses_tensor():
        return x.sum()

    def missing():
        return not_there
    """
)
notebook = loose(NOTEBOOK)


def test_kernel_with_all_that_it_needs():
    source = carry(notebook.scale)
    del sys.modules["loose"]
    scale = source.load()
    sys.modules["loose"] = notebook
    x = torch.randn(100)
    y, roots, constants = scale(x)
    assert torch.equal(y, 2 * x) and roots == [2, 3] and constants == notebook.CONSTANTS
    assert "x = " not in source.text.partition("def ")[0], "the notebook's x is not the function's"


def test_lines_lead_back_to_the_file():
    source = carry(notebook.scale)
    lines, original = source.text.splitlines(), NOTEBOOK.splitlines()
    mapped = 0
    for number, line in enumerate(lines, 1):
        if source.origin(number):
            file, there = source.origin(number)
            assert file == "loose.py" and line.removeprefix("ceil_div = (").removesuffix(")") in original[there - 1]
            mapped += 1
    assert mapped == 19 and source.origin(1) is None
    number = next(number for number, line in enumerate(lines, 1) if "tl.load" in line)
    there = next(number for number, line in enumerate(original, 1) if "tl.load" in line)
    assert source.where(number) == f"loose.py line {there}: x = tl.load(x_ptr + cols, mask=cols < n)"
    assert source.piece(number).name == "scale_kernel"


@pytest.mark.parametrize("kernel", ["scale_kernel", "scaled", "plus"])
def test_kernels(kernel):
    source = carry(getattr(notebook, kernel))
    assert type(source.load()) is type(notebook.scale_kernel)


def test_other_names_for_things():
    both, plus = carry(notebook.aliases).load()()
    assert both.__name__ == "scale" and type(plus) is type(notebook.plus)


def test_functions_that_need_each_other():
    assert carry(notebook.is_even).load()(10) is True


def test_closures_and_lambdas():
    assert carry(notebook.counted(5)).load()(1) == 70
    two, add = 2, 3
    functions = [lambda x: x * two, lambda x, y=1: (x
                                                    + add + y)]  # fmt: skip
    assert [carry(function).load()(10) for function in functions] == [20, 14]


def test_modules_reached_as_attributes():
    source = carry(notebook.joined)
    assert "import numpy.linalg\n" in source.text and source.load()() == ("a/b", 2.0)


def test_a_name_that_means_nothing_is_left_to_fail():
    with pytest.raises(NameError, match="not_there"):
        carry(notebook.missing).load()()


def test_what_can_be_imported_is_imported():
    for thing in (fastkit.kernels.swiglu.launch_forward, fastkit.kernels.swiglu._forward_kernel, math.sqrt):
        if thing is not math.sqrt:
            source = carry(thing)
            assert source.text == f"from fastkit.kernels.swiglu import {source.entry_name}\n"
            assert source.load() is thing
    assert "from math import sqrt as root\n" in carry(notebook.scale).text


def test_autotuned_and_gluon_kernels():
    text = """
        import triton, triton.language as tl
        from triton.experimental import gluon
        from triton.experimental.gluon import language as gl

        @triton.autotune(configs=[triton.Config({"BLOCK": 64})], key=["n"])
        @triton.heuristics({"EVEN": lambda args: args["n"] % 64 == 0})
        @triton.jit
        def tuned(x_ptr, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
            pass

        @gluon.jit
        def layouts(x_ptr, N: gl.constexpr):
            cols = gl.arange(0, N, layout=gl.BlockedLayout([1], [32], [4], [0]))
        """
    for target in ("tuned", "layouts"):
        # Gluon has no interpreter: not in this process
        code = (
            f"import linecache, sys, types; text = {textwrap.dedent(text)!r}\n"
            "linecache.cache['loose.py'] = (len(text), None, text.splitlines(True), 'loose.py')\n"
            "loose = sys.modules['loose'] = types.ModuleType('loose')\n"
            "exec(compile(text, 'loose.py', 'exec'), vars(loose))\n"
            "from fastkit.lab.sources import carry\n"
            f"source = carry(loose.{target})\n"
            "del sys.modules['loose']\n"
            "print(source.text, 'is a', type(source.load()).__name__)\n"
        )
        env = child_environment()
        env.pop("TRITON_INTERPRET", None)
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert child.returncode == 0, child.stderr
        assert f"def {target}" in child.stdout
        assert f"is a {'Autotuner' if target == 'tuned' else 'GluonJITFunction'}" in child.stdout


def test_values_of_others_are_expressed_by_them():
    def express(value):
        return f"__import__('torch').zeros({list(value.shape)})" if isinstance(value, torch.Tensor) else None

    assert carry(notebook.uses_tensor, express).load()() == 0


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (notebook.uses_tensor, "uses_tensor uses x, a Tensor of shape (3,), which cannot be carried"),
        (3, "expected a function, got an int"),
        (torch.relu, "expected a function, got a builtin_function_or_method"),
        (notebook.Tiling.blocks, "Tiling.blocks is a method"),
        (eval("lambda: 1"), "the source of a lambda cannot be found"),
    ],
)
def test_clear_errors(thing, message):
    with pytest.raises(FastkitError) as caught:
        carry(thing)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_two_things_of_one_name():
    a, b = loose("def same():\n    return 1\n").same, loose("def same():\n    return 2\n").same
    with pytest.raises(FastkitError, match="two different things that are named same"):
        carry(lambda: a() + b())


CELLS = """
import sys
from IPython.core.interactiveshell import InteractiveShell
from fastkit.lab.sources import carry
shell = InteractiveShell.instance()
for cell in ({first!r}, {second!r}):
    assert shell.run_cell(cell, store_history=True).success
source = carry(shell.user_ns["twice"])
line = source.text.splitlines().index("    return x * FACTOR") + 1
print(source.load()(4), source.where(line), carry(shell.user_ns["pair"]).load()(), sep="\\n")
"""


def test_cells_of_a_notebook():
    first = "FACTOR = 2\nclass Pair:\n    def total(self):\n        return FACTOR + 1\n"
    second = "%matplotlib --list\ndef twice(x):\n    return x * FACTOR\ndef pair():\n    return Pair().total()\n"
    code = CELLS.format(first=first, second=second)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=child_environment())
    assert child.returncode == 0, child.stderr
    result, where, pair = child.stdout.splitlines()[-3:]
    assert (result, pair) == ("8", "3") and where == "In[2] line 3: return x * FACTOR"


def test_text_from_elsewhere():
    source = read("def f(x):\n    return x + 1\n", "f", "answer.py")
    assert isinstance(source, Source) and source.load()(1) == 2 and source.where(2) == "answer.py line 2: return x + 1"
