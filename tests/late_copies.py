"""Gluon's shared memory and asynchronous copies (cp.async) in Triton's interpreter: copies come as late as may be.

A copy comes when it is waited for and not before; until then, and until a barrier shows it to the other warps, no one
may read where it goes. Nor may one be asked for where, since the last barrier, others may still be reading.
"""

from itertools import chain

import numpy as np

from fastkit.kernels.common import tl


class Place:
    """What a stage of one allocation holds."""

    def __init__(self, dtype, shape):
        self.type, self.value = tl.block_type(dtype, shape), None
        self.state, self.read = "empty", False  # then: asked for, come, seen


class Memory:
    def __init__(self, copies, dtype, stages, shape):
        self.copies, self.dtype, self.places = copies, dtype, [Place(dtype, shape) for _ in range(stages)]

    def index(self, slot):
        slot = int(np.asarray(slot.handle.data).item()) if isinstance(slot, tl.tensor) else slot
        assert 0 <= slot < len(self.places)
        return View(self.places[slot])


class View:
    def __init__(self, place):
        self.place = place

    def load(self, layout):
        assert self.place.state == "seen", f"read, and {self.place.state}"
        self.place.read = True
        return self.place.value


class Copies:
    """In the place of `async_copy`; `allocate` and `barrier` are for `gl.allocate_shared_memory` and `gl.barrier`.

    `words` counts the numbers of int32 that were copied.
    """

    def __init__(self):
        self.places, self.asked, self.groups, self.words = [], [], [], 0

    def allocate(self, dtype, shape, layout):
        memory = Memory(self, dtype, shape[0], shape[1:])
        self.places += memory.places
        return memory

    def async_copy_global_to_shared(self, to, pointers, mask):
        assert not to.place.read, "overwritten while it is read"
        assert list(pointers.shape) == list(to.place.type.shape) and pointers.dtype.element_ty == to.place.type.scalar
        to.place.state = "asked for"
        self.asked.append((to.place, pointers, mask))

    def commit_group(self):
        self.groups.append(self.asked)
        self.asked = []

    def wait_group(self, but):
        while len(self.groups) > but:
            for place, pointers, mask in self.groups.pop(0):
                place.value, place.state = tl.load(pointers, mask=mask, other=0), "come"
                if place.type.scalar == tl.int32:
                    self.words += int(np.broadcast_to(mask.handle.data, place.type.shape).sum())

    def barrier(self):
        for place in self.places:
            place.read = False
            if place.state == "come":
                place.state = "seen"

    def nothing_is_left(self):
        """Whether no copy is under way, as when a program ends."""
        return not list(chain(self.asked, *self.groups))
