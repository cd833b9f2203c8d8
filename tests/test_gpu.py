"""The fine-tune on a GPU: dtypes, kernels in the model, paged optimizers, resume, out of memory."""

import gc

import pytest
import torch
from stopping import stop_at_a_checkpoint
from tiny import tiny_data, tiny_model

from fastkit.errors import FastkitError
from fastkit.train.finetune import FineTune, finetune

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    model, data = tiny_model(folder / "model"), tiny_data(folder / "data", records=24)
    return dict(
        model=str(model), data=str(data), max_length=96, progress=False, steps=8, eval_steps=4, learning_rate=1e-3
    )


def curve(metrics):
    return [loss for _, loss in metrics["losses"]]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_each_dtype_learns_like_fp32_on_the_cpu(inputs, tmp_path, dtype):
    truth = finetune(**inputs, device="cpu", kernels="off", output=str(tmp_path / "cpu"))
    ours = finetune(**inputs, device="cuda", dtype=dtype, packing="off", output=str(tmp_path / "gpu"))
    assert ours["kernels"] == {"layers": 2, "rms_norm": 1, "swiglu": 0, "head": 1, "left": {}, "notes": {}}
    tolerance = {"bf16": 3e-2, "fp16": 1e-2, "fp32": 1e-4}[dtype]  # of losses near 5.7
    assert max(abs(a - b) for a, b in zip(curve(truth), curve(ours), strict=True)) <= tolerance
    assert ours["after"]["validation_loss"] < ours["before"]["validation_loss"]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"])
def test_a_resumed_run_has_the_losses_of_the_whole_one(inputs, tmp_path, optimizer):
    whole = finetune(**inputs, dtype="fp32", optimizer=optimizer, output=str(tmp_path / "whole"))
    stop_at_a_checkpoint(**inputs, dtype="fp32", optimizer=optimizer, output=str(tmp_path / "run"))
    resumed = finetune(**inputs, dtype="fp32", optimizer=optimizer, output=str(tmp_path / "run"), resume=True)
    assert resumed["resumed_from"] == "checkpoint-4"
    assert max(abs(a - b) for a, b in zip(curve(whole), curve(resumed), strict=True)) <= 1e-4


def test_out_of_memory_says_what_to_do(inputs, tmp_path):
    run = FineTune(**inputs, output=str(tmp_path / "run"), samples=0, facts=False).prepare()
    gc.collect()  # as training does: what other tests have left would make room
    torch.cuda.empty_cache()
    reserved, total = torch.cuda.memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(reserved / total)
    try:
        taken = []
        for size in (2**21, 2**20, 2**9):  # what is cached goes first, to the last hole
            with pytest.raises(torch.cuda.OutOfMemoryError):
                while True:
                    taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        with pytest.raises(FastkitError, match=r"out of GPU memory at batch_size 4, .*max_length; checkpoints are"):
            run.train()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
