"""`fastkit bench`: time our kernels and ladders beside torch's and others', against what the card can do."""

import json
from collections.abc import Iterable

import torch

from fastkit.errors import FastkitError
from fastkit.lab.bench_peers import NAMES, said
from fastkit.lab.results import RESULTS, record

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}  # of the largest number: wrong or not


def groups() -> dict[str, dict]:
    """What there is to time: {"kernels": {name: its cases}, "ladders": ...}."""
    from fastkit.lab.bench_kernels import KERNELS
    from fastkit.lab.bench_ladders import LADDERS

    return {"kernels": KERNELS, "ladders": LADDERS}


def bench(names: Iterable[str] = (), repeat_ms: float = 100) -> tuple[list[dict], list[str]]:
    """(rows, notes) for `names`, each of an operation or of one of `groups`; all of them by default.

    A row has op, size, dtype, who, the fields of timing.judge, rate and unit ("GB/s" or "TFLOP/s" of the declared
    cost), predicted_ms and limit (the roofline of the measured card), floor_ms (its time without the launch),
    of_floor = floor_ms / median_ms and, for some, extra_gib, what a run allocates at its peak. The notes name
    contenders that were not timed and say why.

    Raises FastkitError without a GPU or for an unknown name.
    """
    found, chosen = groups(), {}
    every = {name: make for group in found.values() for name, make in group.items()}
    for name in names or found:
        if name not in found and name not in every:
            raise FastkitError(f"no benchmark {name!r}: there are {', '.join([*found, *every])}")
        chosen |= found.get(name) or {name: every[name]}
    if not torch.cuda.is_available():
        there = ", ".join(sorted(path.stem for path in RESULTS.glob("*.json")))
        raise FastkitError(f"benchmarks need a GPU; recorded ones are in data/results: {there}")
    from fastkit.lab.measure import measure

    measure()  # while memory is free
    rows, notes = [], []
    for make in chosen.values():
        for case in make():
            rows += _rows(case, repeat_ms, notes)
            del case  # before the next is made
            torch.cuda.empty_cache()
    return rows, notes


def run(names: list[str], record_as: str | None, as_json: bool) -> int:
    """The command: prints a table or JSON, records if asked to; exit code 1 if a contender gave a wrong result."""
    from fastkit.lab.device import card, versions
    from fastkit.lab.monitor import Monitor

    with Monitor() as monitor:
        rows, notes = bench(names)
    if as_json:
        print(
            json.dumps({"card": card(), "versions": versions(), "watched": str(monitor), "rows": rows, "notes": notes})
        )
    else:
        print(f"{card()['name']}: {monitor}\n")
        print(table(rows))
        print("".join(f"\n{note}" for note in notes))
    if record_as:
        command = " ".join(["fastkit bench", *names, "--record", record_as])
        path = record(record_as, rows, f"{command} ({monitor})")
        if not as_json:
            print(f"\nrecorded in {path}")
    return int(any("WRONG" in note for note in notes))


def table(rows: list[dict]) -> str:
    """The rows as text, under a line for each operation that says what limits it."""
    lines = []
    for row in rows:
        title = f"{row['op']} {row['size']} {row['dtype']}: floor {row['floor_ms']:.4f} ms, by {row['limit']}"
        if title not in lines:
            lines += ["", title, f"  {'':18}{'ms':>9}{'p20':>9}{'p80':>9}{'noise':>9}{'rate':>15}{'of floor':>10}"]
        rate = f"{row['rate']:,.0f} {row['unit']}"
        times = "".join(f"{row[key]:9.4f}" for key in ("median_ms", "p20_ms", "p80_ms", "noise_ms"))
        memory = f", {row['extra_gib']:.3f} GiB beyond its inputs" if "extra_gib" in row else ""
        lines.append(f"  {row['who']:18}{times}{rate:>15}{row['of_floor']:>10.0%}  {row['verdict']}{memory}")
    return "\n".join(lines[1:])


def _rows(case, repeat_ms: float, notes: list[str]) -> list[dict]:
    from fastkit.lab.roofline import predict, rates
    from fastkit.lab.timing import compare

    title = f"{case.op} {case.size}"
    notes += [f"{title}: {who} is left out: {why}" for who, why in case.absent.items()]
    right = {who: run for who, run in case.contenders.items() if _is_right(who, run, case, title, notes)}
    if not right:
        return []
    prediction = predict(case.cost, rates(None, case.dtype, case.tensor))
    floor_ms = max(prediction.memory_ms, prediction.compute_ms)
    work, unit = (case.cost.flops / 1e3, "TFLOP/s") if case.tensor else (case.cost.bytes_moved, "GB/s")
    shared = {
        "op": case.op,
        "size": case.size,
        "dtype": str(case.dtype).removeprefix("torch."),
        "floor_ms": floor_ms,
        "predicted_ms": prediction.time_ms,
        "limit": prediction.limit,
        "unit": unit,
    }
    memory = {who: {"extra_gib": _peak_gib(run)} for who, run in right.items()} if case.memory else {}
    return [
        shared
        | timed
        | {"rate": work / timed["median_ms"] / 1e6, "of_floor": floor_ms / timed["median_ms"]}
        | memory.get(timed["who"], {})
        for timed in compare(right, repeat_ms=repeat_ms)
    ]


def _peak_gib(run) -> float:
    """What a run allocates at its peak, its result included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def _is_right(who: str, run, case, title: str, notes: list[str]) -> bool:
    """Whether a contender's result is near the expected one; a note says why not."""
    if case.output is not None:
        case.output.fill_(torch.nan)  # of another contender, perhaps
    try:
        got = run()
    except NotImplementedError as error:
        notes.append(f"{title}: {who} is left out: {error}")
        return False
    except Exception as error:  # what a peer raises is its result, and must not cost the rows of all others
        if who not in NAMES:
            raise
        notes.append(f"{title}: {who} failed: {said(error)}")
        return False
    got = (got,) if isinstance(got, torch.Tensor) else got
    for ours, expected in zip(got, case.expected, strict=True):
        error = (ours.float() - expected.float()).abs().max().item()
        tolerance = TOLERANCE[case.dtype] if case.tolerance is None else case.tolerance
        allowed = tolerance * expected.float().abs().max().item()
        if not error <= allowed:  # also where it is no number
            notes.append(f"{title}: {who} is WRONG by up to {error:.3g}, allowed is {allowed:.3g}: not timed")
            return False
    return True
