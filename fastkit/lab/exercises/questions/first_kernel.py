"""Questions of notebook 02: programs, masks, transfers."""

from fastkit.lab.exercises.question import Question

QUESTIONS = [
    Question(
        name="first_kernel.programs",
        task="How many programs with BLOCK = 1024 does a vector of 1,000,000 numbers need?",
        answer=977,
        solution="1,000,000 / 1024 is 976.56: 976 full blocks and a last one for the remaining 576 numbers.",
        hints=(
            "A program writes one block, and every number has to be written.",
            "1,000,000 / 1024 = 976.56, and there is no part of a program.",
            "Round up: triton.cdiv(1_000_000, 1024).",
        ),
        mistakes={
            976: "976 programs write 976 * 1024 = 999,424 numbers; the last 576 stay unwritten: round up",
            976.5625: "a program runs whole or not at all: round up, and mask the lanes that are too many",
            1024: "that is the size of a block; how many blocks are there?",
            1000000: "that is one program for each number; here each takes 1024",
        },
    ),
    Question(
        name="first_kernel.masked_lanes",
        task="How many lanes of the last of these programs (1,000,000 numbers, BLOCK = 1024) are masked?",
        answer=448,
        solution="977 * 1024 = 1,000,448 lanes for 1,000,000 numbers: 448 have nothing to do.",
        hints=(
            "Count the lanes of all programs, then those that have a number.",
            "977 programs have 977 * 1024 lanes.",
            "1,000,448 - 1,000,000.",
        ),
        mistakes={
            576: "those are the lanes at work; the other 1024 - 576 are masked",
            0: "1,000,000 is no multiple of 1024, so the last block reaches past the end",
            1024: "then the last program would have nothing to do at all; it has 576 numbers",
        },
    ),
    Question(
        name="first_kernel.how_much_faster",
        task=(
            "PyTorch runs relu(x * 2 + 1), for a large tensor x, as three kernels: product, sum, relu. "
            "How many times faster can one fused kernel be, as far as bytes decide?"
        ),
        answer=3,
        solution="Each of the three kernels reads a tensor and writes one: 6 transfers. Fused: 1 read, 1 written.",
        hints=(
            "Count the tensors that each kernel reads and writes.",
            "Each of the three reads one tensor and writes one; the numbers 2 and 1 weigh nothing.",
            "6 transfers against 2.",
        ),
        mistakes={
            2: "you may have counted 3 + 1 transfers against 2: every kernel that reads also writes, 6 in all",
            6: "6 transfers are right for the parts; divide by those of the fused kernel, which are not 1 but 2",
            1.5: "you may have counted a kernel's reads only: the fused one reads 1 and writes 1",
            1: "the arithmetic is the same, but it is not what takes the time: count the bytes",
        },
    ),
]
