"""Questions of notebook 05: shuffles, the running maximum, passes."""

import math

from fastkit.lab.exercises.question import Question

QUESTIONS = [
    Question(
        name="warp_reductions.shuffles_of_8_warps",
        task=(
            "A program of 8 warps sums a row: each warp its share, then one butterfly over what the 8 warps found. "
            "How many shuffles stand in its code?"
        ),
        answer=8,
        solution="5 within a warp, then 3 over the 8 sums of the warps: log2(32) + log2(8).",
        hints=(
            "All warps run the same code: 5 shuffles stand there once, however many warps there are.",
            "Then 8 numbers are left, one of each warp, fetched through shared memory.",
            "8 numbers take log2(8) steps more.",
        ),
        mistakes={
            5: "then each warp has its own sum, and nobody has the sum of all 8",
            40: "that is how often shuffles run; in the code, which all warps share, 5 stand once",
            10: "the second butterfly need not span 32 lanes: only 8 numbers are left",
            13: "8 sums are joined by a butterfly too, not one after another: log2(8) steps",
        },
    ),
    Question(
        name="warp_reductions.rescale",
        task=(
            "So far the largest number is 3 and the sum of exp(x - 3) is 2. The next block holds one number, 5. "
            "What is the sum of exp(x - 5) after it? Give it to 1%."
        ),
        answer=2 * math.exp(-2) + 1,
        tolerance=0.01,
        solution="Old terms shrink by exp(3 - 5) = 0.135; the new number adds exp(5 - 5) = 1: 2 * 0.135 + 1 = 1.27.",
        hints=(
            "The old sum was taken against 3; all of it must now be taken against 5.",
            "exp(x - 5) = exp(x - 3) * exp(3 - 5).",
            "2 * exp(-2) + exp(5 - 5).",
        ),
        mistakes={
            3.0: "you added exp(0) = 1 to the old sum, which is still taken against 3: scale it first",
            2 * math.exp(2) + 1: "the old terms must shrink, for the new maximum is larger: exp(3 - 5), not exp(5 - 3)",
            2 + math.exp(-2): "it is the old sum that is scaled; the new number is its own maximum and adds exp(0) = 1",
            2 * math.exp(-2): "that is the old sum against 5; the new number adds exp(5 - 5) = 1",
            2 + math.exp(2): "that is the sum against 3; the largest number is 5 now",
        },
    ),
    Question(
        name="warp_reductions.loss_of_long_rows",
        task=(
            "A cross-entropy kernel needs only log(sum(exp(x))) of each row of logits, one number. Rows are too long "
            "for registers. How many times less does it read with the online pass than with one pass for the maximum "
            "and one for the sum?"
        ),
        answer=2,
        solution="Two readings become one, and nothing is written back but a number: 2 transfers against 1.",
        hints=(
            "How often is a row read for the maximum first and the sum then?",
            "And how often if both come out of one pass?",
            "What is written is one number a row: it does not count.",
        ),
        mistakes={
            1.5: "that is softmax, which reads once more and writes a row; here only one number is written",
            3: "the third pass of softmax wrote the row of results: there is none here",
            4 / 3: "that is softmax's 4 transfers against 3; here no row is written",
            1: "the maximum and the sum were two readings; online they are one",
        },
    ),
]
