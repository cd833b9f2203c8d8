"""Hold the tracer's predictions against Nsight Compute: every rung of every ladder, RMSNorm and SwiGLU, on this card.

`fastkit prove --record tracer_h200` writes both, number by number; the tests then hold the predictions of a machine
without a GPU against that record.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch

from fastkit.errors import FastkitError
from fastkit.kernels import common, rms_norm, swiglu
from fastkit.kernels.ladders import add, add_norm, attention, copy, horner, matmul, softmax, transpose, weight_update
from fastkit.lab.device import card, versions
from fastkit.lab.profile import beside, profile
from fastkit.lab.results import record
from fastkit.lab.tracer import Trace, trace_launches

KERNELS = r"^_\w+_kernel$"  # ours; torch's fill the inputs
LADDERS = {  # shapes whose tiles are full, and odd ones, where masks cut some off
    add: (3 * ((2**20,),), 3 * ((2**16 - 37,),)),
    add_norm: (3 * ((1024, 4096),), 3 * ((99, 3001),)),
    copy: (2 * ((2**22,),), 2 * ((2**16 - 37,),)),
    weight_update: (((2**20, 8),), ((2**16 - 37, 8),)),
    transpose: (((2048, 2048), (2048, 2048)), ((200, 333), (333, 200))),
    softmax: (2 * ((1024, 4096),), 2 * ((99, 3001),)),
    horner: (2 * ((2**20,),), 2 * ((2**16 - 37,),)),
    matmul: (((1024, 1024), (1024, 1024), (1024, 1024)), ((200, 88), (88, 208), (200, 208))),
    attention: (4 * ((1, 2, 512, 64),), 4 * ((1, 1, 203, 40),)),
}
ROWS = ((2112, 4096), (99, 3001))  # 2112: as many rows for each of 2 programs on each of an H100's 132 SMs
PROGRAMS = {"full": 32, "odd": None}  # of odd shapes all: programs at an edge are not like the others


def cases(device: str) -> dict[str, Callable[[], object]]:
    """Launches by name. With tensors on "meta", which have no memory, they can be traced but not run.

    A name ends in "full" where no lane is masked: there prediction and counter must be equal.
    """
    found = {}
    for module, sizes in LADDERS.items():
        dtype = torch.float16 if module in (matmul, attention) else torch.float32
        for size, shapes in zip(("full", "odd"), sizes, strict=True):
            given = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
            if module is horner:
                given.insert(1, 2)  # the degree
            for rung in module.RUNGS:
                tensors = [weight_update.laid_out(given[0], rung.name)] if module is weight_update else given
                if not rung.refuses(*tensors):
                    name = module.__name__.rpartition(".")[2]
                    found[f"{name} {rung.name} {size}"] = partial(rung.launcher, *tensors)
    for size, (M, N) in zip(("full", "odd"), ROWS, strict=True):
        a, b, c, d, e = (torch.zeros(M, N, dtype=torch.bfloat16, device=device) for _ in range(5))
        weight = torch.zeros(N, dtype=torch.bfloat16, device=device)
        rstd = torch.zeros(M, dtype=torch.float32, device=device)
        backward = partial(rms_norm.launch_backward, a, b, weight, rstd, c)
        found |= {
            f"rms_norm forward {size}": partial(rms_norm.launch_forward, a, weight, 1e-6, b, rstd),
            f"rms_norm backward {size}": partial(backward, weight_grad=False),
            f"rms_norm backward with dweight {size}": partial(backward, weight_grad=True),
            f"swiglu forward {size}": partial(swiglu.launch_forward, a, b, c),
            f"swiglu backward {size}": partial(swiglu.launch_backward, a, b, c, d, e),
        }
    return found


def launch_all() -> None:
    """Make every launch of `cases` that this card can make, in order: what is profiled."""
    for launch in runnable().values():
        launch()


def runnable() -> dict[str, Callable[[], object]]:
    """The cases that this card can run."""
    arch = int(card()["arch"].removeprefix("sm_"))
    needs = {
        f"{module.__name__.rpartition('.')[2]} {rung.name}": int(rung.needs.removeprefix("sm_") or 0)
        for module in LADDERS
        for rung in module.RUNGS
    }
    return {name: run for name, run in cases("cuda").items() if needs.get(name.rpartition(" ")[0], 0) <= arch}


def predict(name: str, arch: str, sms: int) -> list[Trace]:
    """The traces of a case on a card with `sms` multiprocessors, which decide how many programs some launches have."""
    found = cases("meta")
    if name not in found:
        raise FastkitError(f"no case {name!r}: there are {', '.join(found)}")
    with mock.patch.object(common, "SMS_WITHOUT_GPU", sms):
        return trace_launches(found[name], arch, programs=PROGRAMS[name.rpartition(" ")[2]])


def prove() -> list[dict]:
    """Rows {case, kernel, layouts, what, predicted, measured} of all cases that this card can run.

    layouts  those of the global accesses, as compiled here: another version of Triton may choose others

    Raises FastkitError without a GPU or without ncu.
    """
    if not torch.cuda.is_available():
        raise FastkitError("predictions are proved on a GPU: the recorded proof is data/results/tracer_h200.json")
    measured = profile("fastkit.lab.proof:launch_all", kernel=KERNELS)
    rows = []
    for name in runnable():
        for trace in predict(name, card()["arch"], card()["sms"]):
            counted = measured.pop(0)
            if counted["kernel"] != trace.kernel:
                raise FastkitError(f"{name} launches {trace.kernel}, but ncu saw {counted['kernel']} in its place")
            about = {"case": name, "kernel": trace.kernel, "layouts": layouts(trace)}
            rows += [about | row for row in beside(trace, counted)]
    return rows


def run(record_as: str | None, as_json: bool) -> int:
    """The command: prints a table or JSON, records if asked to; exit code 1 if a prediction is off too far."""
    rows = prove()
    wrong = [row for row in rows if allowed(row) is not None and off(row) > allowed(row)]
    if as_json:
        print(json.dumps({"card": card(), "versions": versions(), "rows": rows}, indent=1))
    else:
        print(table(rows))
        print(f"\n{len(rows) - len(wrong)} of {len(rows)} predictions hold on {card()['name']}")
    if record_as:
        record(record_as, rows, f"fastkit prove --record {record_as}")
    return int(bool(wrong))


def table(rows: list[dict]) -> str:
    """The rows as text, under a line for each case."""
    lines = []
    for row in rows:
        title = f"{row['case']} ({row['kernel']})"
        if title not in lines:
            lines += ["", title]
        limit = allowed(row)
        verdict = (
            "" if limit is None else "holds" if off(row) <= limit else f"OFF by {off(row):.1%}, allowed {limit:.0%}"
        )
        measured = "not counted" if row["measured"] is None else f"{row['measured']:,.4g}"
        lines.append(f"  {row['what']:36}{row['predicted']:>16,.4g}{measured:>16}  {verdict}")
    return "\n".join(lines[1:])


def layouts(trace: Trace) -> str:
    """What the compiler decided for each access: two compilers that decide alike must agree in every count."""
    return "; ".join(f"{access.instruction}.{access.vector_bits} {access.layout}" for access in trace.accesses)


def allowed(row: dict) -> float | None:
    """How far, relative to the counter, a row's prediction may be off; None where it is only shown.

    Sectors by request are exact where no lane is masked and within 2% elsewhere; traffic within 5%. Turns of the banks
    may differ by a tenth: two warps can meet at a bank, which is a conflict to the counter and to no program.
    """
    if row["what"].endswith("_sectors_per_request"):
        return 0.0 if row["case"].endswith("full") else 0.02
    if row["what"].endswith("_bytes_moved"):
        return 0.05
    return 0.1 if row["what"].endswith("_conflict_degree") else None


def off(row: dict) -> float:
    """How far a row's prediction is off, relative to the counter; infinitely without one."""
    if row["measured"] is None:
        return math.inf
    return abs(row["predicted"] - row["measured"]) / (row["measured"] or 1)
