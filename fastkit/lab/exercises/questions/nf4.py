"""Questions of notebook 14: levels, scales, packing."""

from fastkit.kernels.nf4 import CODE
from fastkit.lab.exercises.question import Question


def _index(number: float) -> int:
    return min(range(16), key=lambda index: abs(CODE[index] - number))


def _bits(blocksize: int) -> float:
    return 4 + 8 / blocksize + 32 / (256 * blocksize)


QUESTIONS = [
    Question(
        name="nf4.index_of_a_weight",
        task=(
            "The largest magnitude in a block is 2.0. As which index, 0 to 15, is its number 0.5 kept? "
            "(`nf4.CODE` has the levels.)"
        ),
        answer=lambda: _index(0.5 / 2.0),
        solution="0.5 / 2.0 = 0.25 is nearest to 0.2461, which is number 10, counted from 0. It comes back as 0.4922.",
        hints=(
            "Levels run from -1 to 1. What is the number when its block's largest is 1?",
            "Find the nearest of CODE to 0.5 / 2.0. Counting begins at 0, with -1.0.",
            "CODE[9] is 0.161, CODE[10] is 0.246, CODE[11] is 0.338.",
        ),
        mistakes=lambda right: {
            _index(0.5): "That is the nearest to 0.5 itself; divide by the block's largest magnitude first.",
            right + 1: "Counting begins at 0: CODE[0] is -1.0.",
            _index(0.5 * 2.0): "You multiplied by the largest magnitude; that is the way back.",
            right - 8: "That counts the levels from zero upwards; indices count from -1.0.",
        },
    ),
    Question(
        name="nf4.two_in_a_byte",
        task="Two neighbours have the indices 10 and 3, in this order. Which byte, as a number, holds them?",
        answer=10 * 16 + 3,
        solution="The first number's index goes into the high half: 10 << 4 | 3 = 163.",
        hints=(
            "A byte has two halves of 4 bits. Which half comes first?",
            "The first number stands in the high half, which counts 16-fold.",
            "10 * 16 + 3",
        ),
        mistakes={
            3 * 16 + 10: "That has the first number in the low half; here it goes into the high one.",
            13: "You added the indices: then nobody could tell them apart. The first is shifted by 4 bits.",
            103: "Those are the digits side by side in tens. A half holds 16 values, so it counts 16-fold.",
            10 * 8 + 3: "Shift by 4 bits, a factor of 16, not of 8.",
        },
    ),
    Question(
        name="nf4.bits_of_larger_blocks",
        task=(
            "Blocks of 128 weights instead of 64, double quantization as before (a byte for each absmax, one fp32 "
            "number for each 256 of those). How many bits does a weight take, all counted? Give four digits behind "
            "the point."
        ),
        answer=lambda: _bits(128),
        solution="4 + 8 / 128 + 32 / (256 * 128) = 4 + 0.0625 + 0.0010 = 4.0635.",
        hints=(
            "Three things are kept: indices, absmax of each block, and the scale of 256 absmax.",
            "A byte for 128 weights is 8 / 128 bits a weight.",
            "4 + 8 / 128 + 32 / (256 * 128)",
        ),
        mistakes=lambda right: {
            4 + 32 / 128: "That keeps each absmax in fp32; double quantization keeps it in a byte.",
            _bits(64): "Those are blocks of 64. Twice as many weights share a byte now.",
            4 + 8 / 128: "Nearly: the scales of the absmax, an fp32 number for each 256 of them, are missing.",
            right - 4: "That is what the scales take; the indices come to it.",
            4 + 8 / 128 + 32 / 256: "The fp32 number serves 256 blocks of 128 weights, not 256 weights.",
        },
        tolerance=2e-5,
        unit="bits",
    ),
]
