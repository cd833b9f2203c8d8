"""Fine-tunes, one after another in the processes that torchrun starts.

    torchrun --nproc-per-node 2 tests/several.py '[{"model": ..., "output": ..., "die_at": 3}, ...]'

Each entry is the settings of a run; with `die_at` the last process kills itself after that step.
"""

import gc
import json
import os
import signal
import sys

import torch
from bitsandbytes.nn import Params4bit
from transformers import TrainerCallback

from fastkit.train import processes
from fastkit.train.finetune import FineTune
from fastkit.train.sharding import four_bit


class Die(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


class InParts(TrainerCallback):
    def on_train_begin(self, args, state, control, model, **kwargs):
        assert not whole(model)


def stored(model) -> int:
    """Bytes of the model's parameters in this process."""
    local = (getattr(p, "_local_tensor", p) for p in model.parameters())
    return sum(p.nbytes for p in local)


def whole(model) -> list[torch.Tensor]:
    """What is left of 4-bit weights that were sharded."""
    gc.collect()
    sizes = {module.weight.numel() * module.weight.itemsize for module in four_bit(model)}
    tensors = (x for x in gc.get_objects() if type(x) in (torch.Tensor, Params4bit))
    return [x for x in tensors if x.dtype == torch.uint8 and x.untyped_storage().nbytes() in sizes]


def fine_tune(settings: dict) -> None:
    die_at = settings.pop("die_at", None)
    run = FineTune(**settings).prepare()
    assert run.metrics["kernels"]["layers"] == 2 and not run.metrics["kernels"]["left"]
    size = stored(run.model)
    if die_at:
        run.trainer.add_callback(Die(die_at))
    if settings.get("strategy") == "fsdp2":
        run.trainer.add_callback(InParts())
    run.train()
    for module in run.model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    if settings.get("strategy") == "fsdp2":
        assert stored(run.model) <= 1.05 * size / torch.distributed.get_world_size()
    run.save()


def main(runs: list[dict]) -> None:
    for settings in runs:
        fine_tune(settings)
    processes.leave()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    processes.end(0)
