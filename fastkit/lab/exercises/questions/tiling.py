"""Questions of notebook 06: reuse, tiles, the order of programs."""

from fastkit.lab.exercises.question import Question


def _square() -> int:
    from fastkit.lab.reuse import blocks_loaded

    return sum(blocks_loaded([(row, column) for row in range(4) for column in range(4)], 16))


def _tall() -> int:
    from fastkit.lab.reuse import blocks_loaded

    return sum(blocks_loaded([(row, column) for row in range(8) for column in range(2)], 16))


QUESTIONS = [
    Question(
        name="tiling.square_of_programs",
        task=(
            "a, b and c are cut into 16 × 16 blocks. 16 programs run at once and write a square of 4 × 4 blocks of c. "
            "How many blocks of a and b do they load between them, each counted once?"
        ),
        answer=_square,
        solution="4 rows of blocks of a and 4 columns of blocks of b, each 16 blocks long: (4 + 4) * 16 = 128.",
        hints=(
            "A program loads a whole row of blocks of a and a whole column of blocks of b.",
            "Programs in one row of c want the same row of a. How many different rows are there?",
            "4 rows of a and 4 columns of b, 16 blocks each.",
        ),
        mistakes={
            512: "That is what the 16 programs ask for, 32 blocks each; programs that share a row share its blocks.",
            272: "That is a row of 16 programs: 1 row of a and 16 columns of b. These are a square of 4 × 4.",
            64: "That is a alone; b comes to it.",
            8: "Those are rows and columns; each has 16 blocks.",
        },
    ),
    Question(
        name="tiling.operations_a_byte",
        task=(
            "A program multiplies tiles of 128 × K by K × 64 numbers of 2 bytes. How many operations does it do for "
            "each byte that it loads? A multiply-add is two operations."
        ),
        answer=2 * 128 * 64 / ((128 + 64) * 2),
        solution="For each k: 2 * 128 * 64 operations on (128 + 64) * 2 bytes: 42.7. K falls out.",
        hints=(
            "Take one k: how many numbers of a, how many of b, how many multiply-adds?",
            "128 numbers of a and 64 of b, of 2 bytes each, meet in 128 * 64 multiply-adds.",
            "2 * 128 * 64 / ((128 + 64) * 2)",
        ),
        mistakes={
            128 * 64 / ((128 + 64) * 2): "A multiply-add counts as two operations.",
            2 * 128 * 64 / (128 + 64): "That is for each number; a number has 2 bytes.",
            2 * 128 * 64 / (128 * 2): "You left out the bytes of b.",
            2 * 128 * 64 / (128 * 64 * 2): "128 * 64 numbers are c's tile. What is loaded for each k is 128 + 64.",
        },
        tolerance=0.01,
    ),
    Question(
        name="tiling.not_a_square",
        task=(
            "The same 16 programs now write 8 × 2 blocks of c (GROUP_M = 8) of the same matrices of 16 × 16 blocks. "
            "How many blocks of a and b do they load between them?"
        ),
        answer=_tall,
        solution="(8 + 2) * 16 = 160: more than the square's 128, far less than the 272 of a row of 16.",
        hints=(
            "Count different rows and different columns.",
            "8 rows of a, 2 columns of b.",
            "(8 + 2) * 16",
        ),
        mistakes={
            128: "That is the square of 4 × 4. Rows and columns add up, and 8 + 2 is not 4 + 4.",
            256: "You multiplied 8 by 2: that counts programs. Rows and columns are added.",
            272: "That is a row of 16. Here 8 programs stand below one another.",
            10: "Those are rows and columns; each has 16 blocks.",
        },
    ),
]
