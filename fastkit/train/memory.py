"""A step that runs out of GPU memory is done again under the next leaner plan, with nothing lost."""

import gc
import os
import sys
import warnings
from collections.abc import Callable

import torch
from torch import nn

from fastkit.models.budget import leaner
from fastkit.models.estimate import Shape, describe
from fastkit.models.patch import fused_layers, set_plan
from fastkit.models.plans import PLANS

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def growing_segments() -> None:
    """Have torch's allocator grow its segments on a GPU, unless the environment says whether it does.

    Else a block of one size is of no use to a larger one: a lean step of Mistral-7B that takes 5.7 GiB has 7.1
    reserved, one that keeps everything 30.6 for 27.8 (H200). Memory that was taken before stays as it is.

    Told by torch's function, which counts whenever it is called; torch reads the variable once, and may have done so.
    """
    given = {name: os.environ[name] for name in ALLOCATOR if name in os.environ}
    told = any("expandable_segments" in value for value in given.values())
    if told or sys.platform != "linux" or not torch.cuda.is_available():
        return
    name, others = next(iter(given.items()), (ALLOCATOR[0], ""))
    os.environ[name] = settings = ",".join(filter(None, (others, "expandable_segments:True")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer torch has it under another name, too
        torch.cuda.memory._set_allocator_settings(settings)


class Retry:
    """Runs the passes of each optimizer step, and where memory runs out, all of that step's again.

    Gradients of a step are sums over its passes, and a backward that breaks off leaves some of its own in them. So the
    step begins anew: gradients cleared, random numbers set back, the plan of every fused layer one step leaner. The
    batches of a step are kept for that until the next begins; they are token ids.

    switched    what was said of each change of plan
    """

    def __init__(self, model: nn.Module):
        self.model, self.layers = model, fused_layers(model)
        self.step, self.passes, self.random = None, [], None
        self.switched: list[str] = []

    def run(self, step: int, one_pass: Callable[[dict], torch.Tensor], inputs: dict) -> torch.Tensor:
        """one_pass(inputs), the next pass of optimizer step number `step`: forward and backward; its loss."""
        if step != self.step:
            self.step, self.passes, self.random = step, [], _random_state()
        self.passes.append(dict(inputs))
        again = [inputs]
        while True:
            try:
                for batch in again:
                    loss = one_pass(dict(batch))
                return loss
            except torch.OutOfMemoryError as error:
                plans = self._leaner(self.passes[-1])
                if plans is None:
                    raise
                said = f"out of GPU memory ({str(error).partition('.')[0]}): step {step} begins again under {plans}"
            # outside of the handler: the error's frames hold tensors
            self.model.zero_grad(set_to_none=True)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.switched.append(said)
            warnings.warn(said, stacklevel=2)
            _set_random_state(self.random)
            again = self.passes

    def _leaner(self, inputs: dict) -> str | None:
        """Give the layers leaner plans, and describe them; None where there are none."""
        if not self.layers:
            return None
        shape = Shape.of(self.model.config, torch.bfloat16)
        checkpointed = "recompute-all" if self.layers[0].checkpointed() else "keep"
        plans = leaner([layer.plan or PLANS[checkpointed] for layer in self.layers], shape, inputs["input_ids"].numel())
        if plans is None:
            return None
        set_plan(self.model, plans)
        return describe(plans)


def _random_state() -> tuple:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None


def _set_random_state(state: tuple) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])
