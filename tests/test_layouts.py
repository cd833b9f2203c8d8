import numpy as np
import pytest
import triton
from hypothesis import given
from hypothesis import strategies as st

from fastkit.lab.ir_sites import shared_offsets
from fastkit.lab.layouts import LinearLayout, Requests, traffic, turns, wavefronts


@st.composite
def blocked(draw):
    """(shape, size_per_thread, threads_per_warp, warps_per_cta, order) of a blocked layout of one or two dimensions."""
    rank = draw(st.integers(1, 2))

    def split(total):
        first = draw(st.integers(0, total)) if rank == 2 else total
        return [2**first, 2 ** (total - first)][:rank]

    per_thread = [2 ** draw(st.integers(0, 3)) for _ in range(rank)]
    shape = [2 ** draw(st.integers(0, 10 // rank)) for _ in range(rank)]
    order = draw(st.permutations(range(rank)))
    return shape, per_thread, split(5), split(draw(st.integers(0, 3))), list(order)


def linear(shape, per_thread, threads, warps, order) -> LinearLayout:
    """Bases as Triton makes them: registers, lanes, warps fill the tile by `order`; what is too much repeats it."""
    bases, used = {"register": [], "lane": [], "warp": []}, [1] * len(shape)
    for level, sizes in (("register", per_thread), ("lane", threads), ("warp", warps)):
        for dim in order:
            for _ in range(sizes[dim].bit_length() - 1):
                basis = [0] * len(shape)
                basis[dim] = used[dim] if used[dim] < shape[dim] else 0
                used[dim] *= 2
                bases[level].append(tuple(basis))
    for dim in order:
        while used[dim] < shape[dim]:
            basis = [0] * len(shape)
            basis[dim] = used[dim]
            used[dim] *= 2
            bases["register"].append(tuple(basis))
    return LinearLayout(tuple(shape), *(tuple(bases[level]) for level in ("register", "lane", "warp")))


def by_hand(layout: LinearLayout):
    """The element of each (warp, register, lane), one at a time."""
    for warp in range(2 ** len(layout.warp)):
        for register in range(2 ** len(layout.register)):
            for lane in range(2 ** len(layout.lane)):
                at = [0] * len(layout.shape)
                for number, bases in ((register, layout.register), (lane, layout.lane), (warp, layout.warp)):
                    for bit, basis in enumerate(bases):
                        if number >> bit & 1:
                            at = [a ^ b for a, b in zip(at, basis, strict=True)]
                yield warp, register, lane, int(np.ravel_multi_index(at, layout.shape))


@given(layout=blocked())
def test_elements_are_those_of_the_bases(layout):
    layout = linear(*layout)
    elements = layout.elements()
    for warp, register, lane, element in by_hand(layout):
        assert elements[warp, register, lane] == element


@given(layout=blocked())
def test_requests_of_a_store_move_each_element_once(layout):
    layout = linear(*layout)
    requests = Requests.of(layout, vector=1, once=True)
    moved = requests.elements[requests.active]
    assert sorted(moved) == list(range(int(np.prod(layout.shape))))


@given(layout=blocked())
def test_requests_of_a_load_reach_every_lane_once(layout):
    layout = linear(*layout)
    requests = Requests.of(layout, vector=1, once=False)
    wanted = {(warp, lane, element) for warp, _, lane, element in by_hand(layout)}
    got = [
        (int(warp), lane, int(element))
        for warp, row in zip(requests.warp, requests.elements, strict=True)
        for lane, element in enumerate(row)
    ]
    assert len(got) == len(set(got)) and set(got) == wanted


def counted(addresses, width, active):
    """Requests, sectors, lines and bytes, counted byte by byte."""
    requests = sectors = lines = asked = 0
    for row, taking_part in zip(addresses, active, strict=True):
        touched = {int(a) + i for a, on in zip(row, taking_part, strict=True) if on for i in range(width)}
        requests += bool(touched)
        asked += len(touched)
        sectors += len({byte // 32 for byte in touched})
        lines += len({byte // 128 for byte in touched})
    return requests, sectors, lines, asked


@given(
    data=st.data(),
    width=st.sampled_from([1, 2, 4, 8, 16]),
    spread=st.sampled_from([1, 3, 8, 100, 5000]),
    aligned=st.booleans(),
)
def test_traffic_is_that_counted_byte_by_byte(data, width, spread, aligned):
    draw = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    addresses = draw.integers(0, spread, (3, 32)) * (width if aligned else 1) + 2**20
    active = draw.random((3, 32)) < data.draw(st.sampled_from([0.0, 0.1, 0.9, 1.1]))
    found = traffic(addresses, width, active)
    assert (found.requests, found.sectors, found.lines, found.bytes_asked) == counted(addresses, width, active)


def of_copies(stride, vectors, rows, start):
    """(addresses, which are active) of a request for `vectors` times 16 bytes of each of `rows` rows, 8 lanes a row."""
    row, place = np.divmod(np.arange(32), 8)
    return (start + row * stride + place * 16)[None], ((place < vectors) & (row < rows))[None]


COUNTED = [  # by Nsight Compute on an H200: (bytes between rows, vectors, rows, first byte): cp.async.cg, ld.global.v4
    ((80, 5, 4, 0), 14, 10),
    ((80, 5, 3, 0), 10, 8),
    ((80, 5, 4, 320), 12, 10),
    ((80, 8, 4, 0), 18, 12),
    ((80, 2, 4, 0), 5, 6),
    ((128, 2, 4, 16), 4, 8),
    ((128, 8, 4, 16), 20, 17),
    ((48, 3, 4, 192), 9, 6),
    ((48, 5, 3, 192), 10, 6),
    ((96, 8, 4, 384), 16, 13),
    ((176, 2, 3, 704), 4, 4),
    ((176, 1, 4, 0), 4, 4),
    ((208, 2, 4, 0), 5, 6),
    ((112, 5, 4, 448), 12, 12),
]


@pytest.mark.parametrize(("pattern", "copied", "loaded"), COUNTED)
def test_sectors_of_copies_that_go_past_l1(pattern, copied, loaded):
    addresses, active = of_copies(*pattern)
    assert traffic(addresses, 16, active, past_l1=True).sectors == copied
    assert traffic(addresses, 16, active).sectors == loaded


def test_traffic_of_known_cases():
    lanes, every = np.arange(32)[None], np.ones((1, 32), bool)
    sectors = lambda addresses, width: traffic(addresses, width, every).sectors  # noqa: E731
    assert [sectors(lanes * 4 * stride, 4) for stride in (1, 2, 8, 32)] == [4, 8, 32, 32]
    assert sectors(lanes * 16, 16) == 16  # four numbers a lane
    assert sectors(lanes * 4 + 4, 4) == 5  # begins in mid-sector
    assert sectors(lanes * 0, 4) == 1  # one address for all


@given(data=st.data(), width=st.sampled_from([1, 2, 4, 8, 16]), spread=st.sampled_from([1, 4, 40, 1000]))
def test_wavefronts_are_those_counted_bank_by_bank(data, width, spread):
    draw = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    offsets = draw.integers(0, spread, (2, 32)) * width
    active = draw.random((2, 32)) < data.draw(st.sampled_from([0.0, 0.3, 1.1]))
    taken = least = 0
    group = {1: 32, 2: 32, 4: 32, 8: 16, 16: 8}[width]
    for row, on in zip(offsets, active, strict=True):
        for start in range(0, 32, group):
            words = {
                byte // 4
                for lane in range(start, start + group)
                if on[lane]
                for byte in range(row[lane], row[lane] + width)
            }
            taken += max(sum(word % 32 == bank for word in words) for bank in range(32))
            least += bool(words)
    assert wavefronts(offsets, width, active) == (taken, least)


def test_wavefronts_of_known_cases():
    lanes, every = np.arange(32)[None], np.ones((1, 32), bool)
    assert wavefronts(lanes * 4, 4, every) == (1, 1)
    assert wavefronts(lanes * 128, 4, every) == (32, 1)  # a column of 32 floats a row
    assert wavefronts(lanes * 132, 4, every) == (1, 1)  # the same, padded by a word
    assert wavefronts(lanes * 8, 4, every) == (2, 1)
    assert wavefronts(lanes * 0, 4, every) == (1, 1)  # one word for all lanes
    assert wavefronts(lanes * 16, 16, every) == (4, 4)
    assert turns(np.array([[0, 32, 64, 1]]), np.array([[True, True, False, True]])) == 2


@pytest.fixture(scope="module")
def builder():
    """Triton's own builder, whose layouts and bank conflicts ours are compared with."""
    from triton._C.libtriton import gluon_ir, ir

    context = ir.context()
    ir.load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)
    module = builder.create_module()
    module.context = context
    module.set_attr("ttg.target", builder.get_string_attr("cuda:80"))
    for name, value in (("num-warps", 4), ("num-ctas", 1), ("threads-per-warp", 32)):
        module.set_attr(f"ttg.{name}", builder.get_int32_attr(value))
    function = builder.get_or_insert_function(module, "f", builder.get_function_ty([], []), "public", False)
    module.push_back(function)
    builder.set_insertion_point_to_start(function.add_entry_block())
    builder.kept_alive = context, module
    return builder


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("order", [[1, 0], [0, 1]], ids=["rows", "columns"])
@pytest.mark.parametrize(("vec", "per_phase", "max_phase"), [(1, 1, 1), (1, 1, 32), (4, 1, 8), (2, 4, 8), (8, 2, 4)])
def test_bank_conflicts_are_those_that_triton_counts(builder, vec, per_phase, max_phase, order, bits):
    from triton.experimental.gluon import language as gl

    shape = [32, 64]
    shared = gl.SwizzledSharedLayout(vec, per_phase, max_phase, order)
    for lanes, lane_order in (([1, 32], [1, 0]), ([32, 1], [0, 1])):
        blocked = gl.BlockedLayout([1, 1], lanes, [4, 1], lane_order)
        bases = builder.to_linear_layout(blocked._to_ir(builder), shape)
        layout = LinearLayout(
            tuple(shape), *(tuple(map(tuple, b)) for b in (bases.reg_bases, bases.lane_bases, bases.warp_bases))
        )
        offsets = shared_offsets(shared, shape, shape, bits)
        assert sorted(offsets) == [i * bits // 8 for i in range(32 * 64)]
        requests = Requests.of(layout, 1, once=False)
        taken, least = wavefronts(offsets[requests.elements], bits // 8, requests.active)
        if bits == 32:  # narrower elements may be joined to vectors there
            theirs = builder.get_shared_bank_conflicts(blocked._to_ir(builder), shared._to_ir(builder), shape, bits)
            if layouts_vector(offsets, layout) == 1:
                assert taken - least == theirs * least


def layouts_vector(offsets, layout) -> int:
    """How many neighbouring registers of a lane lie side by side in shared memory: 1 if the first two do not."""
    elements = layout.elements()
    return 1 if elements.shape[1] < 2 or (np.diff(offsets[elements[:, :2]], axis=1) != 4).any() else 2


@pytest.mark.skipif(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7), reason="older builders abort on these")
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_the_layout_of_matrix_units_is_triton_s(builder, width, bits):
    from triton.experimental.gluon import language as gl

    shape = [64, 128]
    layout = gl.NVMMASharedLayout(width, bits, 2)
    bases = builder.to_linear_layout(layout._to_ir(builder), shape).offset_bases
    numbers = LinearLayout(tuple(shape), tuple(map(tuple, bases)), (), ()).elements()[0, :, 0]
    theirs = np.empty_like(numbers)
    theirs[numbers] = np.arange(len(numbers))
    ours = shared_offsets(layout, shape, shape, bits)
    assert (ours == theirs * bits // 8).all()
    turned = shared_offsets(gl.NVMMASharedLayout(width, bits, 2, transposed=True), shape[::-1], shape[::-1], bits)
    assert (turned.reshape(128, 64).T.reshape(-1) == ours).all()


def test_a_part_of_a_buffer_keeps_the_buffer_s_layout():
    from triton.experimental.gluon import language as gl

    layout = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    whole = shared_offsets(layout, [64, 64], [64, 64], 16).reshape(64, 64)
    part = shared_offsets(layout, [64, 16], [2, 64, 64], 16).reshape(64, 16)
    assert (part == whole[:, :16]).all()


def test_padding_moves_each_row():
    from triton.experimental.gluon import language as gl

    layout = gl.PaddedSharedLayout.with_identity_for([[32, 1]], [32, 32], [1, 0])
    offsets = shared_offsets(layout, [32, 32], [32, 32], 32).reshape(32, 32)
    assert (offsets == 4 * (np.arange(32)[:, None] * 33 + np.arange(32))).all()


def test_what_is_not_known_is_none():
    assert shared_offsets(object(), [32], [32], 32) is None
