"""The pictures contain what they claim, say "unknown" of what is not known, and can be read."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from fastkit.errors import FastkitError
from fastkit.kernels.common import Cost
from fastkit.lab import plots, widgets
from fastkit.lab.bank_conflicts import SharedAccess
from fastkit.lab.cards import KNOWN
from fastkit.lab.layouts import LINE, SECTOR, LinearLayout, traffic, wavefronts
from fastkit.lab.measure import Measured
from fastkit.lab.plots import memory, paper, tiles
from fastkit.lab.roofline import rates, roofline
from fastkit.lab.tracer import Access, Trace

SOURCE = "measured now on a card of the test"
BLOCKED = "BlockedLayout(size_per_thread=[{}], threads_per_warp=[{}], warps_per_cta=[{}], order=[{}])"


def access(**known) -> Access:
    about = dict(kind="load", argument="x_ptr", file="a.py", line=7, source="x = tl.load(x_ptr + cols)", bits=32)
    about |= dict(
        shape=(128,), layout=BLOCKED.format(1, 32, 4, 0), instruction="ld.global", vector_bits=32, masked=True
    )
    return Access(**about | known)


def shared(offsets, **known) -> SharedAccess:
    about = dict(kind="load", operation="ttg.local_load", line=9, source="tile.load()", bits=32, shape=(32, 32))
    about |= dict(layout="", register_layout="", instruction="ld.shared", vector_bits=32)
    return SharedAccess(**about | dict(offsets=offsets) | known)


def drawn(figure) -> Counter:
    return Counter(patch.get_gid() for axes in figure.axes for patch in axes.patches)


def shown(figure) -> list[Text]:
    """Every text of the picture, but for the ticks that lie outside its axes."""
    found = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        found += [*axes.texts, axes.xaxis.label, axes.yaxis.label] if axes.axison else axes.texts
        for axis in (axes.xaxis, axes.yaxis) if axes.axison else ():
            low, high = sorted(axis.get_view_interval())
            found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def texts(figure) -> list[str]:
    return [text.get_text() for text in shown(figure)]


def says(figure, words: str) -> bool:
    return any(words in text for text in texts(figure))


def check(figure) -> None:
    """The picture is drawn; its words are large enough and inside it; its headline stands in it."""
    assert figure.png().startswith(b"\x89PNG")
    width, height = figure.get_size_inches() * figure.dpi
    figure.draw_without_rendering()  # at the figure's own resolution
    for text in shown(figure):
        assert text.get_fontsize() >= 9, text
        box = Text.get_window_extent(text, figure.canvas.get_renderer())
        assert box.x0 >= -3 and box.x1 <= width + 3 and box.y0 >= -3 and box.y1 <= height + 3, (text, box)
    assert figure.headline and says(figure, figure.headline.split(" ")[0])


# --- lanes and sectors, banks


@given(
    st.sampled_from([(16, 16), (32, 32), (32, 64), (32, 128), (16, 128), (64, 64)]),
    st.lists(st.integers(-1, 3000), min_size=32, max_size=32).filter(lambda numbers: max(numbers) >= 0),
)
def test_the_sectors_drawn_are_those_that_count(bits, numbers):
    element, vector = bits
    lanes = np.array([number * vector // 8 if number >= 0 else -1 for number in numbers])
    figure = plots.lanes_and_sectors(access(bits=element, vector_bits=vector, lanes=lanes))
    cost = traffic(lanes[None], vector // 8, lanes[None] >= 0)
    found = drawn(figure)
    assert found["touched sector"] == cost.sectors
    assert found["lane"] == (lanes >= 0).sum() and found["masked lane"] == (lanes < 0).sum()
    assert found["line"] in (0, cost.lines)
    assert f"{cost.sectors:,} sector" in figure.headline and f"{cost.bytes_asked:,} byte" in figure.headline
    assert says(figure, "sectors a request unknown") and not says(figure, "0 sectors a request")
    check(figure)


@given(st.integers(0, 5), st.integers(1, 40))
def test_wanted_bytes_are_drawn_where_they_lie(first, stride):
    lanes = 4 * (first + stride * np.arange(32))
    strip = memory._Strip(lanes, 4)
    starts = np.array(sorted({offset // strip.unit * strip.unit for offset in lanes.tolist()}))
    assert np.array_equal(strip.starts, starts) and strip.unit == (LINE if len(set(lanes // LINE)) <= 8 else SECTOR)
    assert (np.diff(strip.x(lanes)) > 0).all()
    moved = (strip.at - strip.starts)[np.searchsorted(starts, lanes, "right") - 1]
    assert np.allclose(strip.x(lanes) - lanes, moved)


def test_an_access_without_lanes_is_unknown():
    figure = plots.lanes_and_sectors(access(unknown="an atomic operation"))
    assert says(figure, "unknown: an atomic operation")
    check(figure)
    assert says(plots.lanes_and_sectors(access(instruction="TMA load")), "copy engine")


@given(st.sampled_from([1, 2, 4, 8, 16]), st.lists(st.integers(-1, 255), min_size=32, max_size=32), st.randoms())
def test_the_turns_drawn_are_the_wavefronts(width, numbers, random):
    offsets = np.array(numbers) * width
    offsets[offsets < 0] = -1
    taken, least = wavefronts(offsets[None], width, offsets[None] >= 0)
    groups = memory.served(offsets, width)
    assert (sum(map(len, groups)), len(groups)) == (taken, least)
    lanes = Counter(lane for group in groups for turn in group for served in turn.values() for lane in served)
    assert lanes == {lane: max(1, width // 4) for lane in range(32) if offsets[lane] >= 0}
    if taken and random.random() < 0.3:  # drawing takes longest
        figure = plots.bank_map(shared(offsets, bits=8, vector_bits=8 * width))
        found = drawn(figure)
        cells = sum(len(turn) for group in groups for turn in group)
        assert found["word"] + found["conflict"] == cells and sum(found.values()) == 32 * taken
        assert ("No conflicts" in figure.headline) == (taken == least) and says(figure, "turns unknown")
        check(figure)


def test_a_column_of_an_unswizzled_tile_is_31_conflicts():
    figure = plots.bank_map(shared(np.arange(32) * 128, requests=32, wavefronts=1024, least=32))
    assert figure.headline.startswith("31 conflicts") and drawn(figure)["conflict"] == 31
    assert says(figure, "32 requests, 1,024 turns; 32 would do")
    assert "No conflicts" in plots.bank_map(shared(np.zeros(32, dtype=int))).headline  # one word for all
    assert says(plots.bank_map(shared(None, unknown="its layout is the compiler's own")), "unknown: its layout")


# --- tiles


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.data())
def test_a_tile_is_drawn_where_its_numbers_are(rows, columns, high, wide, data):
    tile = 4 * (np.arange(high)[:, None] * columns + np.arange(wide))
    inside = (np.arange(high)[:, None] < rows) & (np.arange(wide) < columns)
    tile = np.where(inside, tile, -1)
    walk = [((0, 0, 0), 0)]
    for _ in range(data.draw(st.integers(0, 4))):
        row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
        walk.append(((len(walk), 0, 0), 4 * (row * columns + column)))
    step = data.draw(st.none() | st.integers(0, len(walk) - 1))
    figure = plots.tile_walk(access(tile=tile, walk=tuple(walk)), (rows, columns), step)
    at = walk[step or 0][1] // 4
    room = min(high, rows, rows - at // columns) * min(wide, columns, columns - at % columns)
    area = sum(p.get_width() * p.get_height() for p in figure.axes[0].patches if p.get_gid() == "touched now")
    assert area == room
    check(figure)


def test_a_walk_says_how_many_steps_and_whose():
    tile = 4 * np.arange(16).reshape(1, 16)
    loop = access(tile=tile, walk=tuple(((0, 0, 0), 64 * step) for step in range(20)))
    figure = plots.tile_walk(loop, (4, 64))
    assert figure.headline == "x_ptr: 16 numbers at once; the first 8 steps are those of one program, in a loop"
    labels = [text.get_text() for text in figure.axes[0].texts if text.get_gid() == "step"]
    assert labels == [str(step) for step in range(8)] and drawn(figure) == {"touched now": 1, "touched": 7}
    again = access(tile=tile, walk=(((0, 0, 0), 0), ((1, 0, 0), 0)))  # two programs, one place
    assert drawn(plots.tile_walk(again, (4, 64), step=1)) == {"touched now": 1}
    assert says(plots.tile_walk(again, (4, 64), step=1), "1·p1, 0·p0")
    flat = access(tile=4 * np.arange(100), walk=(((0, 0, 0), 0),))  # over the ends of rows
    area = sum(p.get_width() * p.get_height() for p in plots.tile_walk(flat, (20, 7)).axes[0].patches)
    assert area == 100
    check(plots.tile_walk(access(tile=tile, walk=loop.walk), (5000, 3000)))
    with pytest.raises(FastkitError, match="no step 20: the report keeps 20"):
        plots.tile_walk(loop, (4, 64), step=20)
    with pytest.raises(FastkitError, match="no matrix"):
        plots.tile_walk(loop, (4, 64), stride=63)
    assert says(plots.tile_walk(access(), (4, 64)), "unknown")


def powers(most):
    return st.sampled_from([2**n for n in range(most + 1)])


@given(powers(2), powers(2), powers(5), powers(2), powers(2), st.permutations([0, 1]), powers(5), powers(5))
def test_a_blocked_layout_is_what_its_bases_say(size0, size1, lanes0, warps0, warps1, order, rows, columns):
    size, threads, warps, shape = (size0, size1), (lanes0, 32 // lanes0), (warps0, warps1), (rows, columns)
    bases, filled = {}, [1, 1]
    for level, counts in (("register", size), ("lane", threads), ("warp", warps)):
        bases[level] = []
        for dim in order:
            for _ in range(counts[dim].bit_length() - 1):
                step = filled[dim] if filled[dim] < shape[dim] else 0  # beyond the tile: a copy
                bases[level].append(tuple(step if d == dim else 0 for d in range(2)))
                filled[dim] *= 2
    for dim in order:  # the rest of the tile is further registers
        while filled[dim] < shape[dim]:
            bases["register"].append(tuple(filled[dim] if d == dim else 0 for d in range(2)))
            filled[dim] *= 2
    spread = LinearLayout(shape, *(tuple(bases[level]) for level in ("register", "lane", "warp")))
    held = spread.elements()
    warp, lane, copies = tiles._owners(spread)
    for element in range(rows * columns):
        w, _, lanes = np.nonzero(held == element)
        owners = sorted(set(zip(w.tolist(), lanes.tolist(), strict=True)))
        assert owners[0] == (warp.flat[element], lane.flat[element]) and len(owners) == copies


def test_a_layout_is_cut_sliced_or_unknown():
    lanes = ((0, 4), (0, 8), (0, 16), (0, 32), (1, 0))
    registers = ((0, 1), (0, 2), (8, 0), (16, 0), (32, 0))
    spread = LinearLayout((64, 64), registers, lanes, ((2, 0), (4, 0)))
    layout = BLOCKED.format("1, 4", "2, 16", "4, 1", "1, 0")
    figure = plots.layout_map(access(shape=(64, 64), layout=layout, spread=spread))
    assert figure.headline == "A lane holds 4 numbers side by side" and says(figure, "first 16 × 32 of 64 × 64")
    assert drawn(figure)["warp 1 lane 17"] == 2 and sum(drawn(figure).values()) == 16 * 8
    check(figure)
    sliced = LinearLayout((16,), ((1,), (2,)), ((4,), (8,), (0,), (0,), (0,)), ((0,), (0,)))
    row = plots.layout_map(access(shape=(16,), layout=f"SliceLayout(dim=0, parent={layout})", spread=sliced))
    assert says(row, "held 32 times") and drawn(row) == {f"warp 0 lane {lane}": 1 for lane in range(4)}
    check(row)
    assert says(plots.layout_map(access(shape=(16, 16), layout="", instruction="TMA load")), "unknown")


def test_pictures_of_a_traced_kernel_agree_with_its_report():
    pytest.importorskip("triton")
    from fastkit.kernels.ladders import transpose
    from fastkit.lab.tracer import trace_launches

    x, y = torch.empty(64, 128), torch.empty(128, 64)
    (trace,) = trace_launches(lambda: transpose.launch_naive(x, y), arch="sm_80")
    for one in trace.accesses:
        assert drawn(plots.lanes_and_sectors(one))["touched sector"] == one.sectors_per_request
        warp, lane, _ = tiles._owners(one.spread)
        assert [one.tile[(lane[0] == n) & (warp[0] == 0)][0] for n in range(32)] == one.lanes.tolist()
    store = trace.of("store")[0]
    assert "one program, in a loop" in plots.tile_walk(store, (128, 64)).headline
    counted = {row["what"]: row["predicted"] for row in plots.speeds.beside(trace, {})}
    counted |= {"load_bytes_moved": None, "registers": 3 * trace.registers}
    figure = plots.compare(trace, counted, SOURCE)
    known = [value for value in counted.values() if value is not None]
    assert figure.headline.startswith(f"{len(known) - 1} of {len(known)} predictions") and says(figure, SOURCE)
    assert texts(figure).count("unknown") >= 2  # as the number and as the ratio
    check(figure)
    nothing = plots.compare(replace(trace, accesses=(), registers=0, occupancy=None), {"registers": 5}, SOURCE)
    assert says(nothing, "no ratio")
    assert isinstance(widgets.explore(plots.lanes_and_sectors, trace), paper.Picture)
    assert isinstance(trace, Trace)


# --- times


@given(st.floats(1, 1e3), st.floats(1, 1e3), st.integers(1, 6), st.integers(1, 24))
def test_a_schedule_obeys_its_model(load, compute, stages, iterations):
    slots = plots.schedule(load, compute, stages, iterations)
    for before, after in itertools.pairwise(slots):
        assert after.compute_start >= before.compute_end
    for slot in slots:
        assert slot.compute_start >= slot.load_end and slot.load_end == slot.load_start + load
        flying = sum(other.load_start <= slot.load_start < other.compute_start for other in slots)
        assert flying <= max(1, stages - 1)
    if stages == 1:
        assert math.isclose(slots[-1].compute_end, iterations * (load + compute))
    else:
        steady = max(compute, load / (stages - 1))
        assert slots[-1].compute_end >= load + compute + 0.999 * (iterations - stages + 1) * steady - steady
        assert slots[-1].compute_end <= plots.schedule(load, compute, stages - 1, iterations)[-1].compute_end + 1e-6


def test_a_pipeline_shows_every_turn_and_every_gap():
    figure = plots.pipeline(500, 200, iterations=8)
    found = drawn(figure)
    assert found["load"] == found["compute"] == 4 * 8 and found["wait"] == 8 + 8 + 4 + 1
    assert (
        says(figure, "A model, not a measurement")
        and says(figure, "5,600: 29% busy")
        and "from 4 on" in figure.headline
    )
    check(figure)
    check(plots.pipeline(1, 1000, stages=2, iterations=64))
    for wrong in (dict(load=0), dict(compute=math.nan), dict(stages=()), dict(stages=0), dict(iterations=0)):
        with pytest.raises(FastkitError):
            plots.pipeline(**{"load": 5, "compute": 2} | wrong)


def sample(t, **values):
    return dict(t_s=t, sm_mhz=1500, temperature_c=60, power_w=300.0, reasons=["idle"]) | values


def test_throttling_shows_reasons_and_what_is_unknown():
    samples = [sample(0.1 * n, reasons=["power cap"] if 3 <= n < 6 or n == 8 else ["idle"]) for n in range(10)]
    figure = plots.throttling(samples, SOURCE)
    assert "held back by power cap" in figure.headline and says(figure, SOURCE)
    (bars,) = [c for axes in figure.axes for c in axes.collections if c.get_gid() == "power cap"]
    assert [tuple(path.get_extents().intervalx.round(3)) for path in bars.get_paths()] == [(0.3, 0.6), (0.8, 0.9)]
    check(figure)
    assert "held back by nothing" in plots.throttling([sample(0), sample(1)], SOURCE).headline
    blind = plots.throttling([sample(0, power_w=None, reasons=None)] * 2, SOURCE)
    assert "what held it back is unknown" in blind.headline and says(blind, "unknown: this card does not tell")
    check(blind)
    assert says(plots.throttling([], SOURCE), "unknown")
    assert says(plots.throttling([sample(0, sm_mhz=None)], SOURCE), "The clock is unknown")


# --- speeds


@settings(max_examples=5)  # drawing takes a second
@given(st.sampled_from(sorted(KNOWN)), st.lists(st.tuples(st.floats(-1, 4), st.floats(-2, 3)), max_size=7))
def test_a_roofline_has_every_ceiling_and_every_point(name, places):
    cost = [Cost(10**9, round(10 ** (9 + x))) for x, _ in places]
    points = [
        plots.point(f"rung {n}", c, c.flops / 10**y / 1e9)
        for n, (c, (_, y)) in enumerate(zip(cost, places, strict=True))
    ]
    figure = plots.roofline(name, points, SOURCE)
    lines = {line.get_gid(): line for line in figure.axes[0].lines}
    for one in points:
        assert lines[f"point {one.name}"].get_xydata()[0] == pytest.approx([one.intensity, one.tflops])
    reached = rates(name)
    x, y = lines["memory"].get_data()
    assert y / x == pytest.approx(reached.gbps / 1e3) and lines["fp32 arithmetic"].get_ydata()[0] == reached.tflops
    ceilings = [text for text in figure.axes[0].texts if text.get_gid() == "roof"]
    assert len(ceilings) == len(lines) - len(points)
    assert says(figure, f"ceilings: {name}") and says(figure, SOURCE)
    check(figure)
    assert not overlapping([text for text in figure.axes[0].texts if text.get_gid() in ("label", "roof")], figure)


def overlapping(labels, figure):
    boxes = [Text.get_window_extent(label, figure.canvas.get_renderer()) for label in labels]
    upright = [box for box, label in zip(boxes, labels, strict=True) if label.get_rotation() == 0]
    return [pair for pair in itertools.combinations(upright, 2) if Bbox.intersection(*pair) and overlap(*pair) > 1]


def overlap(a, b):
    return min(min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0))


def test_points_come_from_a_cost_and_a_time():
    cost = Cost(10**9, 2 * 10**12)
    assert plots.point("a", cost, 4.0) == plots.Point("a", 2000.0, 500.0, True)
    guess = roofline(cost, card="H100 SXM", tensor=True)
    assert plots.point("a", cost, guess) == plots.Point("a", 2000.0, pytest.approx(712.4, abs=0.1), False)
    for wrong in ((Cost(10**9, 0), 1.0), (cost, 0.0), (cost, math.nan), (cost, None)):
        with pytest.raises(FastkitError):
            plots.point("a", *wrong)
    with pytest.raises(FastkitError, match="need a source"):
        plots.roofline("T4", [plots.point("a", cost, 4.0)])
    assert says(plots.roofline("H100 SXM", [plots.point("a", cost, guess)]), "predicted")
    unknown = replace(KNOWN["T4"], tensor_tflops={}, fp32_tflops=None)
    with pytest.raises(FastkitError, match="unknown"):
        plots.roofline(unknown, [])
    here = Measured(KNOWN["H100 SXM"], 3020.0, {"float16": 690.0, "bfloat16": 715.0}, 4.0, 6.0)
    figure = plots.roofline(here, [plots.Point("a", 3000.0, 500.0, True)], SOURCE)
    assert says(figure, "690 fp16 tensor cores") and "is at 72% of the roof above it: fp16" in figure.headline


def row(who, median_ms, **more):
    return (
        dict(op="copy", size="64", dtype="float32", who=who, median_ms=median_ms, floor_ms=0.5, limit="memory") | more
    )


def test_a_ladder_shows_shares_of_the_limit():
    from fastkit.kernels.ladders.copy import RUNGS

    names = [rung.name for rung in RUNGS]
    rows = [row(name, 2.0 / (n + 1), rate=100.0 * n + 1, unit="GB/s") for n, name in enumerate(names)]
    figure = plots.ladder([*rows, row("x.clone()", None)], SOURCE, RUNGS)
    bars = {patch.get_gid(): patch.get_width() for patch in figure.axes[0].patches}
    assert bars == {f"bar {name}": 0.25 * (n + 1) for n, name in enumerate(names)} | {"bar x.clone()": 0}
    assert figure.headline == f"{names[-1]} reaches 75% of the limit's speed, 3 times faster than {names[0]}"
    assert says(figure, "unknown") and says(figure, SOURCE) and says(figure, "0.5 ms") and says(figure, "101 GB/s")
    assert len([text for text in figure.axes[0].texts if text.get_gid() == "idea"]) == len(RUNGS)
    check(figure)
    beyond = plots.ladder([row("a", 0.25)], SOURCE, limit=("cuBLAS", 0.5))
    assert says(beyond, "cuBLAS: 0.5 ms") and says(beyond, "200%")
    check(beyond)
    assert "unknown" in plots.ladder([row("a", None)], SOURCE).headline
    apart = plots.ladder(
        [row("less", 0.6), row("a", 2.0), row("b", 1.0), row("it", 0.5)], SOURCE, others=("less", "it")
    )
    assert apart.headline == "b reaches 50% of the limit's speed, 2 times faster than a"
    assert [bool(patch.get_hatch()) for patch in apart.axes[0].patches] == [True, False, False, True]
    for wrong in ([], [row("a", 1.0), row("a", 1.0, size="128")], [row("a", 1.0, floor_ms=None)]):
        with pytest.raises(FastkitError):
            plots.ladder(wrong, SOURCE)
