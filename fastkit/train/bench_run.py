"""A contender of `fastkit bench train` at work: its steps, timed, and the memory that they take."""

import gc
import statistics
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fastkit.errors import FastkitError
from fastkit.models.bnb import bnb
from fastkit.models.graphs import Graphs
from fastkit.models.load import first_line, resolve_device, resolve_dtype
from fastkit.train import processes, sharding
from fastkit.train.bench_contenders import CONTENDERS, Settings
from fastkit.train.flat import Flat

LEARNING_RATE = 2e-4
PROFILED = 3  # steps


class Run:
    """A contender's model, ready for its steps."""

    def __init__(self, settings: Settings):
        self.settings, self.device = settings, resolve_device(settings.device)
        processes.join(self.device)
        self.dtype = resolve_dtype("auto", self.device)
        model, self.told = CONTENDERS[settings.who].make(settings, self.dtype)
        self.vocabulary = model.config.vocab_size
        self.model = model.train()
        if self._is_sharded():
            sharding.shard(self.model)
            self.told["estimated_gib"] = None  # which is of a whole model
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self._optimizer()
        if settings.processes > 1 and not self._is_sharded():
            self.model = DistributedDataParallel(self.model)
        self.graphs = Graphs(self.model) if settings.graphs else None
        self.replays = settings.graphs  # as against launched one by one

    def _is_sharded(self) -> bool:
        return self.settings.processes > 1 and self.settings.strategy == "fsdp2"

    def _optimizer(self) -> torch.optim.Optimizer:
        if self.settings.who != "ours":
            return bnb.optim.AdamW8bit(self.trained, lr=LEARNING_RATE, weight_decay=0.0)
        if self._is_sharded():
            return torch.optim.AdamW(self.trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        flat = Flat(self.trained)  # as in our trainer
        return flat.attach(bnb.optim.AdamW8bit([flat.parameter], lr=LEARNING_RATE, weight_decay=0.0))

    def batches(self) -> Iterator[torch.Tensor]:
        """Token ids [batch, seq], without end, the same for every contender; other ones in each process."""
        generator = torch.Generator().manual_seed(self.settings.seed + processes.number())
        size = self.settings.batch, self.settings.seq
        while True:
            yield torch.randint(self.vocabulary, size, generator=generator).to(self.device)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss of a batch."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.device.type == "cuda"):
            return self.model(input_ids=ids, labels=ids).loss

    def gradients(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss of a batch, whose gradients are the parameters' `grad` now."""
        if self.graphs is None:
            loss = self.forward(ids)
            loss.backward()
            return loss
        run = self.graphs.run if self.replays else self.graphs.launch
        return run(lambda inputs: self.forward(**inputs), {"ids": ids})

    def update(self) -> None:
        """The optimizer's part of a step."""
        self.optimizer.step()
        for parameter in self.trained:  # the model's zero_grad asks all its modules, while the GPU waits
            parameter.grad = None

    def step(self, ids: torch.Tensor) -> tuple[float, float]:
        """(seconds by the wall clock between two waits for the device, the loss) of a step."""
        self.synchronize()
        start = time.perf_counter()
        loss = self.gradients(ids)
        self.update()
        self.synchronize()
        return time.perf_counter() - start, loss.item()

    def launch(self) -> None:
        """From here on, kernel by kernel."""
        self.replays, self.graphs = False, None
        gc.collect()
        torch.cuda.empty_cache()  # of what the graph worked in
        self.graphs = Graphs(self.model)

    def link(self) -> dict:
        """What joins several GPUs, and how fast they add up 256 MiB: GB/s that each sends (NCCL's bus bandwidth)."""
        if self.settings.processes == 1 or self.device.type != "cuda":
            return {}
        from fastkit.lab.monitor import link

        x = torch.ones(2**26, device=self.device)
        dist.all_reduce(x)
        self.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            dist.all_reduce(x)
        self.synchronize()
        seconds, n = (time.perf_counter() - start) / 20, self.settings.processes
        return {"link": link(0, 1), "all_reduce_gbps": 2 * (n - 1) / n * x.nbytes / seconds / 1e9}

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(settings: Settings) -> dict:
    """{"row": times of a contender's steps, its losses and its memory, "stages": for ours, where a step's time goes}.

    Memory is torch's peak from the first step on, the warm-up's included; the allocator starts empty but for the model.
    CUDA's own context is not in it. Where the stages cannot be had, a text says why.
    """
    from fastkit.lab.monitor import Monitor
    from fastkit.train.bench_stages import stages

    run = Run(settings)
    cuda = run.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(run.device)
        loaded_gib = torch.cuda.memory_allocated(run.device) / 2**30
    batches = run.batches()
    first = [run.step(next(batches)) for _ in range(settings.warmup)]
    with Monitor(interval_s=0.25) as monitor:
        timed = [run.step(next(batches)) for _ in range(settings.steps)]
    seconds, losses = [spent for spent, _ in timed], [loss for _, loss in first + timed]
    tokens = settings.batch * settings.seq * settings.processes
    row = {
        "median_ms": 1e3 * statistics.median(seconds),
        "fastest_ms": 1e3 * min(seconds),
        "slowest_ms": 1e3 * max(seconds),
        "tokens_per_second": tokens / statistics.median(seconds),
        "loaded_gib": loaded_gib if cuda else None,
        "peak_allocated_gib": torch.cuda.max_memory_allocated(run.device) / 2**30 if cuda else None,
        "peak_reserved_gib": torch.cuda.max_memory_reserved(run.device) / 2**30 if cuda else None,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "trained": sum(p.numel() for p in run.trained),
        "dtype": str(run.dtype).removeprefix("torch."),
        "watched": str(monitor),
        **run.told,
        **run.link(),
    }
    try:
        found = None
        if settings.who == "ours" and settings.processes == 1:
            found = stages(run, batches, PROFILED)
    except (RuntimeError, FastkitError) as error:  # a GPU that may not be profiled, memory that does not suffice
        found = first_line(error)
    return {"row": row, "stages": found}
