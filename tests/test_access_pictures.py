"""The pictures of notebooks 03 and 04: they count what the tracer's own arithmetic counts, and draw what they count."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastkit.errors import FastkitError
from fastkit.lab.layouts import BANKS, LANES, wavefronts
from fastkit.lab.plots.banks import banks_of, column_turns, tile_banks
from fastkit.lab.plots.coalescing import record_times, request_of, strided_request


def drawn(figure, gid):
    return [artist for axes in figure.axes for artist in axes.patches + axes.lines if artist.get_gid() == gid]


@pytest.mark.parametrize(
    ("stride", "number_bytes", "first_byte", "sectors", "lines"),
    [(0, 4, 0, 1, 1), (1, 4, 0, 4, 1), (1, 4, 4, 5, 2), (2, 4, 0, 8, 2), (8, 4, 0, 32, 8), (32, 4, 0, 32, 32),
     (4, 2, 0, 8, 2), (1, 16, 0, 16, 4), (3, 8, 8, 24, 6)],
)  # fmt: skip
def test_what_a_strided_request_moves(stride, number_bytes, first_byte, sectors, lines):
    moved = request_of(stride, number_bytes, first_byte)
    assert (moved.sectors, moved.lines) == (sectors, lines)
    figure = strided_request(stride, number_bytes, first_byte)
    assert f"move {sectors} sector" in figure.headline
    assert len(drawn(figure, "touched sector")) == sectors and len(drawn(figure, "lane")) == LANES


@given(stride=st.integers(0, 100), number_bytes=st.sampled_from([1, 2, 4, 8, 16]), first=st.integers(0, 20))
def test_sectors_are_those_of_the_bytes(stride, number_bytes, first):
    places = {first * number_bytes + lane * stride * number_bytes for lane in range(LANES)}
    wanted = {(place + byte) // 32 for place in places for byte in range(number_bytes)}
    assert request_of(stride, number_bytes, first * number_bytes).sectors == len(wanted)


@given(row_words=st.integers(1, 64), data=st.data())
def test_turns_are_those_of_the_banks(row_words, data):
    column = data.draw(st.integers(0, row_words - 1))
    phases = data.draw(st.sampled_from([p for p in (1, 2, 4, 8, 16, 32) if row_words % p == 0]))
    places = [row_words * m + (column ^ (m % phases)) for m in range(LANES)]
    taken, least = wavefronts(4 * np.array([places]), 4, np.ones((1, LANES), dtype=bool))
    assert least == 1 and column_turns(row_words, phases, column) == taken
    if phases == 1:
        assert taken == math.gcd(row_words, BANKS)
    assert (np.sort(banks_of(32, 32), axis=1) == np.arange(BANKS)).all()  # a row touches every bank once


@pytest.mark.parametrize(
    ("row_words", "phases", "turns"), [(32, 1, 32), (33, 1, 1), (36, 1, 4), (32, 8, 4), (32, 32, 1)]
)
def test_a_tile_shows_who_waits(row_words, phases, turns):
    figure = tile_banks(row_words, phases, column=3)
    assert figure.headline.endswith(f"32 lanes take {turns} turn" + "s" * (turns > 1))
    tile, bars = figure.axes
    waiting = sum(patch.get_gid() == "conflict" for patch in tile.patches)
    assert waiting == LANES - LANES // turns
    assert max(patch.get_x() + patch.get_width() for patch in bars.patches) == turns


def test_record_times_say_how_far_the_model_is():
    rows = [{"fields": fields, "ms": 1.1 * fields, "least_ms": fields} for fields in (8, 2)]
    figure = record_times(rows, "measured now on a card")
    assert "to within 10%" in figure.headline
    assert list(drawn(figure, "measured")[0].get_ydata()) == [2.2, 8.8]
    assert any("measured now on a card" in text.get_text() for text in figure.texts)
    rows.append({"fields": 32, "ms": 64.0, "least_ms": 32.0})
    assert "miss the time of a record size by up to 100%" in record_times(rows, "measured now on a card").headline


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: request_of(1, 3), "a lane moves 1, 2, 4, 8 or 16 bytes with one instruction, not 3"),
        (lambda: strided_request(1, 8, 4), "stride 1, first byte 4: give numbers from 0 up, the byte a multiple of 8"),
        (lambda: request_of(-1), "stride -1"),
        (lambda: tile_banks(33, 8), "a swizzle over 8 rows exchanges words in groups of 8, which do not fill rows"),
        (lambda: tile_banks(32, 3), "phases 3: give 1 to 64 words, a power of two"),
        (lambda: tile_banks(0), "row_words 0"),
        (lambda: tile_banks(32, 1, 32), "column 32: rows have 32 words"),
        (lambda: record_times([], "a card"), "there are no rows"),
    ],
)
def test_clear_errors(call, message):
    with pytest.raises(FastkitError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
