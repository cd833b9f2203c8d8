"""What the kernels share: scalars of Triton's interpreter."""

import operator
from types import SimpleNamespace

import numpy as np
import pytest

from fastkit.kernels.common import with_scalar_index


class Scope:
    def set_attr(self, owner, name, value):
        setattr(owner, name, value)


class Tensor:
    """A scalar, as the interpreter has it."""

    def __init__(self, value):
        self.handle = SimpleNamespace(data=np.array([value]))


def as_in_triton_3_6(tensor, scope):
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data))
    scope.set_attr(tensor, "T", "transposed")


def test_a_scalar_counts_whatever_numpy_thinks_of_arrays_of_one():
    with_scalar_index(as_in_triton_3_6)(Tensor, Scope())
    assert operator.index(Tensor(3)) == 3 and list(range(Tensor(2))) == [0, 1]
    assert Tensor.T == "transposed"  # all else as it was


def test_more_than_a_scalar_does_not():
    with_scalar_index(as_in_triton_3_6)(Tensor, Scope())
    several = Tensor(0)
    several.handle.data = np.arange(2)
    with pytest.raises(TypeError):
        operator.index(several)
