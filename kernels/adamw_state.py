"""What AdamW remembers, in 32 or 8 bits, in bitsandbytes' format (Dettmers et al. 2022, arXiv:2110.02861).

In 8 bits a running mean becomes one byte a number and an fp32 absmax for each block of 256 numbers. A byte is the
number of a value in a map of 256, ascending from -1 (or 0) to 1, and stands for map[byte] * absmax. The map is dense
near 0, as what counts is the relative error: it has 2^i values in decade i of seven, from 1e-6 to 1, and as many
negative ones; or twice as many, all positive.

To find the value nearest to x / absmax is to count the midpoints between neighbours that lie below it. The 255
midpoints are stored as a binary search tree: node i's children are 2i (below) and 2i + 1 (above), and eight steps from
node 1 end at 256 + the count. Sorted midpoints could be searched in eight steps too; but there, the values that a step
may ask for lie a power of two apart, most of them in the same memory bank, while the nodes of a level are neighbours.

bitsandbytes' own backends differ in how they round to 8 bits. Its Triton kernels take the nearest value, as we do; its
CUDA kernels then move an m whose value came out with the other sign, 0 being positive, one byte on; its CPU kernels
first round x / absmax to a multiple of 2/65535. All read the same bytes in the same way.
"""

import functools
import math
from dataclasses import dataclass

import torch

BLOCK_N = 256  # numbers that share an absmax
WRAPPED = "__bnb_optimizer_quant_state__"  # under which bitsandbytes saves all but the step, since it supports FSDP


@dataclass(eq=False)
class State:
    """What AdamW remembers of n numbers between steps, changed in place. The names are bitsandbytes'.

    step              int32 []: steps taken; skipped ones do not count
    state1, state2    m and v: float32, or uint8 if they are kept in 8 bits; of the parameter's shape, contiguous
    absmax1, absmax2  float32 [ceil(n / 256)]: what the bytes of a block are relative to; None for a float32 state
    codebook          what bytes mean (`codebook`); None for a float32 state
    arrivals          int32 []: 0 between steps
    """

    step: torch.Tensor
    state1: torch.Tensor
    state2: torch.Tensor
    absmax1: torch.Tensor | None
    absmax2: torch.Tensor | None
    codebook: torch.Tensor | None
    arrivals: torch.Tensor

    @classmethod
    def zeros(cls, param: torch.Tensor, bits: int = 32) -> "State":
        """The state of `param` before its first step, in 32 or 8 bits. Raises ValueError for another number of bits."""
        if bits not in (32, 8):
            raise ValueError(f"adamw: the state has {bits} bits; 32 or 8 are supported")
        zeros = functools.partial(torch.zeros, device=param.device)
        eight_bit, blocks = bits == 8, -(-param.numel() // BLOCK_N)
        states = [zeros(param.shape, dtype=torch.uint8 if eight_bit else torch.float32) for _ in range(2)]
        absmax = [zeros(blocks) if eight_bit else None for _ in range(2)]
        step, arrivals = (zeros((), dtype=torch.int32) for _ in range(2))
        return cls(step, *states, *absmax, codebook(param.device) if eight_bit else None, arrivals)

    def part(self, start: int, shape: tuple[int, ...]) -> "State":
        """The state of the parameter of `shape` whose first number is number `start` of the flat one. A view.

        Raises ValueError unless `start` is a multiple of 256 and the part lies within.
        """
        stop = start + math.prod(shape)
        if start % BLOCK_N or not 0 <= start <= stop <= self.state1.numel():
            raise ValueError(
                f"adamw: numbers {start} to {stop} are no part of a state of {self.state1.numel()}; "
                f"a part starts at a multiple of {BLOCK_N}, where a block does"
            )
        blocks = slice(start // BLOCK_N, -(-stop // BLOCK_N))
        absmax = [None if a is None else a[blocks] for a in (self.absmax1, self.absmax2)]
        states = [s.view(-1)[start:stop].view(shape) for s in (self.state1, self.state2)]
        return State(self.step, *states, *absmax, self.codebook, self.arrivals)

    def to_bitsandbytes(self) -> dict:
        """The entry of this parameter in the state_dict of bitsandbytes' AdamW or AdamW8bit. Waits for the GPU."""
        found = {"step": int(self.step), "state1": self.state1, "state2": self.state2}
        if self.codebook is not None:
            qmap1, qmap2 = self.codebook[:2]
            found |= {"absmax1": self.absmax1, "absmax2": self.absmax2, "qmap1": qmap1, "qmap2": qmap2}
        return found

    def load_bitsandbytes(self, saved: dict) -> None:
        """Take over such an entry. Raises ValueError if it is of another size, dtype or map."""
        saved = saved | saved.get(WRAPPED, {})
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        tensors = {name: tensors[name] for name in ("state1", "state2", "absmax1", "absmax2") if name in tensors}
        for name, tensor in tensors.items():
            theirs = saved.get(name, torch.empty(0))
            if theirs.numel() != tensor.numel() or theirs.dtype != tensor.dtype:
                raise ValueError(
                    f"adamw: {name} has {theirs.numel()} numbers of {theirs.dtype} in the saved state, here "
                    f"{tensor.numel()} of {tensor.dtype}; load the state of this very parameter"
                )
        for which in ("1", "2") if self.codebook is not None else ():
            if not torch.equal(saved[f"qmap{which}"].cpu(), self.codebook[int(which) - 1].cpu()):
                raise ValueError(f"adamw: the saved state's qmap{which} is not bitsandbytes' dynamic map; start anew")
        for name, tensor in tensors.items():
            tensor.copy_(saved[name].view(tensor.shape))
        self.step.fill_(saved["step"])


def dynamic_map(signed: bool) -> torch.Tensor:
    """The 256 values of a byte, ascending, float32: bitsandbytes' create_dynamic_map(signed), bit for bit.

    A decade's values are the middles of equal steps from a tenth of it to all of it; 0 and 1 are added.
    """
    decades = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        decades.append(10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2))
    values = torch.cat(decades)
    return torch.cat([values, -values if signed else values[:0], torch.tensor([0.0, 1.0])]).sort().values


def midpoints(qmap: torch.Tensor) -> torch.Tensor:
    """The 255 numbers half-way between neighbours of the map."""
    return (qmap[1:] + qmap[:-1]) / 2


@functools.cache
def codebook(device: torch.device) -> torch.Tensor:
    """[4, 256] on `device`: the map of m, the map of v, then for each the tree of its midpoints, from node 1 on."""
    maps = [dynamic_map(signed=True), dynamic_map(signed=False)]
    nodes = torch.arange(1, 256)
    level = nodes.float().log2().floor().long()  # 2^level nodes stand on it, evenly among the sorted midpoints
    order = ((2 * (nodes - 2**level) + 1) << (7 - level)) - 1
    trees = [torch.cat([torch.zeros(1), midpoints(qmap)[order]]) for qmap in maps]
    return torch.stack(maps + trees).to(device)


def decoded(codes: torch.Tensor, absmax: torch.Tensor, qmap: torch.Tensor) -> torch.Tensor:
    """The numbers [n] that the bytes `codes` [n] stand for, in plain torch."""
    return qmap[codes.int()] * absmax.repeat_interleave(BLOCK_N)[: codes.numel()]


def encoded(x: torch.Tensor, qmap: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes [n], absmax [ceil(n / 256)]) of x [n], in plain torch; a tie goes to the lower code.

    A block of nothing but subnormal numbers is taken for zeros.
    """
    blocks = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK_N)).view(-1, BLOCK_N)
    least = torch.finfo(torch.float32).tiny  # normal; less has no reciprocal
    absmax = blocks.abs().amax(1)
    absmax = absmax.where(absmax >= least, 0.0)
    relative = blocks * (1 / absmax.clamp(min=least))[:, None]  # 0 stays 0
    return torch.bucketize(relative, midpoints(qmap)).view(-1)[: x.numel()], absmax
