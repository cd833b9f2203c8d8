"""Questions of notebook 04: banks, turns, swizzles."""

from fastkit.lab.exercises.question import Question


def _turns(row_words: int) -> int:
    from fastkit.lab.plots.banks import column_turns

    return column_turns(row_words)


def _bank(row: int, column: int) -> int:
    from fastkit.lab.plots.banks import banks_of

    return int(banks_of(32, phases=32)[row, column])


QUESTIONS = [
    Question(
        name="shared_memory_banks.rows_of_40",
        task=(
            "Somebody pads a tile of float32 from 32 to 40 words a row, to be safe. How many turns does a warp take "
            "now to read a column, a row a lane?"
        ),
        answer=lambda: _turns(40),
        solution=(
            "Lane m wants bank 40 * m % 32 = 8 * m % 32: only banks 0, 8, 16 and 24, each for 8 lanes. 8 turns. An odd "
            "number of words between rows reaches all 32 banks, and 33 is the least of them."
        ),
        hints=(
            "Which banks do lanes 0, 1, 2, 3 and 4 want?",
            "40 * m % 32 takes only a few different values. How many?",
            "32 lanes, spread over 4 banks.",
        ),
        mistakes={
            1: "33 words would give that. With 40, lanes 0 and 4 want the same bank: 40 * 4 is divisible by 32.",
            4: "Four is the number of banks that are used. How many lanes wait at each?",
            32: "That is a row of 32 words, whose column lies in one bank. Padding did help a little.",
            40: "Only 32 lanes ask, so no request takes more than 32 turns.",
        },
    ),
    Question(
        name="shared_memory_banks.where_it_lies",
        task="In the swizzled tile of 32 by 32 float32, in which bank lies the number of row 5, column 12?",
        answer=lambda: _bank(5, 12),
        solution="It stands at 12 ^ 5 of its row: binary 01100 ^ 00101 = 01001, which is 9. Rows begin at bank 0.",
        hints=(
            "Column n of row m goes to place n ^ m of its row; ^ is Python's exclusive or.",
            "Write 12 and 5 in binary, one below the other: a bit of the result is set where they differ.",
            "12 ^ 5",
        ),
        mistakes={
            12: "That is the plain tile. The swizzle moves it within the row.",
            17: "You added. ^ is the exclusive or: no carry.",
            7: "12 - 5 also gives every row another order, but the swizzle takes the exclusive or.",
            13: "That is the inclusive or, |. Where both have a bit, the exclusive or has none.",
        },
    ),
    Question(
        name="shared_memory_banks.half_precision",
        task=(
            "A tile of 32 by 32 float16, row after row, without padding or swizzle. How many turns does a warp take to "
            "read a column, a row a lane?"
        ),
        answer=lambda: _turns(16),
        solution=(
            "A row is 32 * 2 bytes, 16 words, so lane m wants bank 16 * m % 32 (plus a constant): two banks, each for "
            "16 lanes. 16 turns."
        ),
        hints=(
            "How many words of 4 bytes does a row have now?",
            "Lane m's word is 16 * m words after lane 0's. Which banks are those?",
            "Two rows fill a round of the banks, so the column lies in two of them.",
        ),
        mistakes={
            32: "That is float32, where a row fills all banks. A row of float16 is half as long.",
            2: "Two is the number of banks that the column lies in.",
            1: "Lanes share a turn for the same word. These 32 numbers lie in 32 different words.",
            8: "Two banks share 32 lanes: how many has each?",
        },
    ),
]
