"""Which binaries the launches of a training step need, without a GPU: for test_warmup.py, in a process of its own.

    python tests/specialisations.py MODEL batch seq arch dtype

Triton takes this process for one with a GPU of `arch`, and each launch ends where it would look for its binary: what is
compared is Triton's own key for that. Prints, as JSON, the keys of a warm-up, those of attention in batches of random
packed rows, and those of these and of batches of random shapes that were not among the first.
"""

import json
import random
import sys

import torch
from triton.runtime.jit import JITFunction

import fastkit.kernels.common as common
from fastkit.kernels import attention_forward
from fastkit.lab.compiling import take_for
from fastkit.models import warmup
from fastkit.models.graphs import filled, told
from fastkit.models.load import config_for, resolve_dtype
from fastkit.models.patch import patched
from fastkit.models.sequences import Packed, begin, ends
from fastkit.train.packing import RowCollator

model, (batch, seq), (arch, dtype) = sys.argv[1], map(int, sys.argv[2:4]), sys.argv[4:]
take_for(arch)
common.INTERPRETED = True  # kernels for CPU tensors; they are compiled ones, for TRITON_INTERPRET is not set
keys: set[str] = set()


def note(kernel, *args, grid=None, warmup=False, **options):
    _, specialisation, chosen = kernel.device_caches["none"][-1](*args, **options)
    keys.add(f"{kernel.fn.__name__} {specialisation} {sorted(chosen.items())}")


def draw_row() -> list[dict]:
    """Records that make a row: few and long, many and short, or as it comes."""
    row, room, longest = [], drawn.randint(2, seq), drawn.choice([2, 8, 32, seq])
    while room:
        length = min(room, drawn.randint(1, longest))
        row.append({"input_ids": [5] * length, "labels": drawn.choices([5, -100], k=length)})
        room -= length
    return row


def packed_steps(count: int, plan: str) -> None:
    """Steps with random packed rows, given as the trainer gives them; each is launched as a captured one is, too."""
    net = warmup._small(config_for(model), resolve_dtype(dtype, cpu), cpu, settings["rank"], 0.0)
    with patched(net, plan):
        for _ in range(count):
            rows = [draw_row() for _ in range(drawn.randint(1, batch))]
            inputs = RowCollator(0)(rows)
            net(**inputs, use_cache=False, num_items_in_batch=torch.ones(())).loss.backward()
            inputs = RowCollator(0, width=drawn.randint(inputs["input_ids"].shape[1], seq))(rows)
            position_ids = inputs["position_ids"]
            with told(net, Packed(filled(ends(begin(position_ids))), position_ids.shape[1])):
                net(**inputs, use_cache=False, num_items_in_batch=torch.ones(())).loss.backward()


JITFunction.run = note
for name, module in list(sys.modules.items()):
    if name.startswith("fastkit."):
        for function, value in (("architecture", lambda device: arch), ("sm_count", lambda device: 132)):
            if hasattr(module, function) and getattr(module, function).__module__ == "fastkit.kernels.common":
                setattr(module, function, value)
cpu = torch.device("cpu")
settings = dict(batch=batch, seq=seq, rank=8, device="cpu", dtype=dtype)
warmup.SHORT = 32  # fewer lengths than are warmed by default, and so more that are left out
attention_forward.CACHED_BYTES = 2**13  # as many heads' keys fit as do of a larger model
warmup.warm_up(model, plans=["keep", "leanest"], **settings)
warmed = set(keys)
drawn = random.Random(0)
sizes = [(drawn.randint(1, batch), drawn.randint(1, seq)) for _ in range(30)]
warmup.shapes = lambda batch, seq: sizes
warmup.warm_up(model, plans=["keep"], **settings)
of_shapes = set(keys)
keys.clear()
packed_steps(36, "keep")
packed_steps(4, "leanest")
packed = [key for key in keys if key.startswith(("_forward_kernel", "_backward_d"))]
missed = sorted((keys | of_shapes) - warmed)
print(json.dumps({"warmed": sorted(warmed), "packed": sorted(packed), "missed": missed}))
