"""Questions of notebook 03: sectors, lines, records, wide loads."""

from fastkit.lab.exercises.question import Question


def _sectors(stride: int, number_bytes: int, first_byte: int = 0) -> int:
    from fastkit.lab.plots.coalescing import request_of

    return request_of(stride, number_bytes, first_byte).sectors


QUESTIONS = [
    Question(
        name="coalescing.one_number_late",
        task=(
            "The 32 lanes of a warp load 32 neighbouring float32 numbers, as in rung `coalesced`, but of `x[1:]`: the "
            "first number begins 4 bytes after the beginning of a line. How many sectors does the request touch?"
        ),
        answer=lambda: _sectors(1, 4, first_byte=4),
        solution=(
            "They reach from byte 4 to byte 131: sectors 0 to 3, and of the next line's first sector the last number. "
            "Five sectors, of which the caches serve two to a neighbour as well."
        ),
        hints=(
            "Sectors begin at multiples of 32 bytes, wherever the lanes begin.",
            "The lanes want bytes 4 to 131. Which multiples of 32 bytes lie between?",
            "strided_request(1, first_byte=4) draws it.",
        ),
        mistakes={
            4: "That is right for x itself. The last number, at byte 128, lies past those four sectors.",
            32: "A sector a lane is what lanes 8 numbers apart take; here they are neighbours.",
            2: "Two is the number of lines. How many sectors of them are touched?",
            8: "Whole lines do not move: of the second line only the sector that is wanted.",
        },
    ),
    Question(
        name="coalescing.half_apart",
        task=(
            "Now the numbers are float16 and the lanes 4 numbers apart, beginning at a line's first byte. How many "
            "sectors does a request of 32 lanes touch?"
        ),
        answer=lambda: _sectors(4, 2),
        solution="Neighbours are 4 * 2 = 8 bytes apart, so 4 lanes share a sector: 32 / 4 = 8 sectors.",
        hints=(
            "How many bytes lie between the numbers of neighbouring lanes?",
            "How many lanes' numbers then fall into one sector of 32 bytes?",
            "32 lanes, 4 of them in a sector.",
        ),
        mistakes={
            16: "That would be float32, 16 bytes apart. A float16 has 2 bytes.",
            2: "That is the least for 64 bytes, if the lanes stood side by side.",
            32: "A sector a lane: they would have to be 32 bytes apart.",
            4: "Four lanes share a sector; how many sectors does that make for all lanes?",
        },
    ),
    Question(
        name="coalescing.adam",
        task=(
            "Adam reads four fields of a record, weight, gradient and two moments, and writes three, all but the "
            "gradient. The records are those of `weight_update`: 8 numbers of 4 bytes. How many times as many bytes "
            "must move, at least, with `aos` as with `soa`? (To within 2%.)"
        ),
        answer=64 / 28,
        tolerance=0.02,
        solution=(
            "aos reads and writes the record's whole sector: 2 * 32 = 64 bytes a parameter. soa reads 4 * 4 and writes "
            "3 * 4 bytes: 28. 64 / 28 = 2.29. The more of a record an update wants, the less aos costs."
        ),
        hints=(
            "Whatever is wanted of a record, with aos its sector moves, once to read and once to write.",
            "With soa only what is wanted moves: four fields in, three out, 4 bytes each.",
            "(32 + 32) / (4 * 4 + 3 * 4).",
        ),
        mistakes={
            8: "That is a request's count of sectors. The other fields' requests find the same sectors in the cache.",
            16 / 3: "That is plain gradient descent, which reads two fields and writes one.",
            2: "You counted the reads, or took as many fields written as read.",
            8 / 7: "With aos what moves is not the seven numbers, nor one sector, but the sector twice: in and out.",
            4: "That is 64 bytes by four fields; count what soa reads and what it writes.",
        },
    ),
]
