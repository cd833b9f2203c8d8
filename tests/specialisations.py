"""Which binaries the launches of a training step need, without a GPU: for test_warmup.py, in a process of its own.

    python tests/specialisations.py MODEL batch seq arch dtype

Triton takes this process for one with a GPU of `arch`, and each launch ends where it would look for its binary: what is
compared is Triton's own key for that. Prints, as JSON, the keys of a warm-up and those of batches of random shapes that
were not among them.
"""

import json
import random
import sys

from triton.runtime.jit import JITFunction

import fastkit.kernels.common as common
from fastkit.lab.compiling import take_for
from fastkit.models import warmup

model, (batch, seq), (arch, dtype) = sys.argv[1], map(int, sys.argv[2:4]), sys.argv[4:]
take_for(arch)
common.INTERPRETED = True  # kernels for CPU tensors; they are compiled ones, for TRITON_INTERPRET is not set
keys: set[str] = set()


def note(kernel, *args, grid=None, warmup=False, **options):
    _, specialisation, chosen = kernel.device_caches["none"][-1](*args, **options)
    keys.add(f"{kernel.fn.__name__} {specialisation} {sorted(chosen.items())}")


JITFunction.run = note
for name, module in list(sys.modules.items()):
    if name.startswith("fastkit."):
        for function, value in (("architecture", lambda device: arch), ("sm_count", lambda device: 132)):
            if hasattr(module, function) and getattr(module, function).__module__ == "fastkit.kernels.common":
                setattr(module, function, value)
settings = dict(batch=batch, seq=seq, rank=8, device="cpu", dtype=dtype)
warmup.SHORT = 32  # fewer lengths than are warmed by default, and so more that are left out
warmup.warm_up(model, plans=["keep", "leanest"], **settings)
warmed = set(keys)
drawn = random.Random(0)
sizes = [(drawn.randint(1, batch), drawn.randint(1, seq)) for _ in range(30)]
warmup.shapes = lambda batch, seq: sizes
warmup.warm_up(model, plans=["keep"], **settings)
print(json.dumps({"warmed": sorted(warmed), "missed": sorted(keys - warmed)}))
