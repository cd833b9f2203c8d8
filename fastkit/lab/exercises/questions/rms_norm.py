"""Questions of notebook 09: a gradient by hand, what is kept, partial sums."""

from fastkit.lab.exercises.question import Question

QUESTIONS = [
    Question(
        name="rms_norm.one_number_of_dx",
        task=(
            "A row x = (2, -2, 2, -2) with weight 1 and eps 0 meets dy = (1, 0, 0, 0). What is the first number of dx?"
        ),
        answer=0.375,
        solution=(
            "mean(x²) = 4, so rstd = 0.5 and x_hat = (1, -1, 1, -1). c = mean(x_hat * dy) = 1/4, and "
            "dx = 0.5 * (1 - 1 * 1/4) = 0.375."
        ),
        hints=(
            "Begin with rstd = 1 / sqrt(mean(x²)), then x_hat = x * rstd.",
            "c = mean(x_hat * wdy): one of four products is not 0.",
            "dx = rstd * (wdy - x_hat * c), all of it for the first number.",
        ),
        mistakes={
            0.5: "that is rstd * wdy alone: x reaches the loss through rstd as well, which takes x_hat * c away",
            0.75: "rstd stands before the bracket: rows twice as long have half the gradient",
            0.0: "c is the mean of x_hat * wdy over the 4 numbers, not their sum",
            0.625: "a longer x makes rstd smaller: the second term is taken away, not added",
            0.25: "x_hat is x * rstd = 1 there, not x = 2",
        },
    ),
    Question(
        name="rms_norm.kept_of_rows",
        task=(
            "Two norms in each of 40 layers and one at the end keep rstd in fp32 for the backward, of 8,192 rows of "
            "5,120 numbers (Llama-2-13B). How many MB (1e6 bytes) are that together?"
        ),
        answer=81 * 8192 * 4 / 1e6,
        tolerance=0.01,
        unit="MB",
        solution="rstd is one number a row, however long: 81 norms * 8,192 rows * 4 bytes = 2.65 MB.",
        hints=(
            "How many numbers does rstd have for one norm? Does it matter how long a row is?",
            "8,192 numbers of 4 bytes for each norm.",
            "2 * 40 + 1 norms.",
        ),
        mistakes={
            80 * 8192 * 4 / 1e6: "one norm more stands after the last layer",
            81 * 8192 * 2 / 1e6: "rstd is kept in fp32: 4 bytes a number",
            8192 * 4 / 1e6: "that is one norm's; each of the 81 keeps its own until its backward",
            81 * 8192 * 5120 * 4 / 1e6: "that is a number for each number of x; rstd is one for each row",
            81 * 8192 * 5120 * 2 / 1e6: "that is x in bf16; rstd is one number a row",
            81 * 5120 * 4 / 1e6: "rstd is one number for each row, and there are 8,192 rows; 5,120 is their length",
        },
    ),
    Question(
        name="rms_norm.partial_sums",
        task=(
            "An RTX 4090 has 128 multiprocessors; two walkers for each sum dweight of rows of 5,120 numbers. How many "
            "MiB do their partial sums in fp32 take in memory?"
        ),
        answer=2 * 128 * 5120 * 4 / 2**20,
        unit="MiB",
        solution="256 walkers leave a row each: 256 * 5,120 numbers * 4 bytes = 5 MiB, however many rows they walked.",
        hints=(
            "How many rows of partial sums are there? Each walker leaves one.",
            "2 * 128 rows of 5,120 numbers.",
            "4 bytes a number; a MiB has 2**20 bytes.",
        ),
        mistakes={
            2.5: "each walker's row is in fp32, 4 bytes a number, and there are two walkers for each multiprocessor",
            10: "they are written and read once each, which is 10 MiB of traffic; they take half of that as room",
            160: "that would be a row of partial sums for each of 8,192 rows; a walker leaves one for all its rows",
            5.24288: "that is in MB; a MiB has 2**20 bytes",
        },
    ),
]
