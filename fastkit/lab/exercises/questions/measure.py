"""Questions of notebook 01: time, launches, ceilings, the roofline."""

from fastkit.lab.exercises.question import Question

QUESTIONS = [
    Question(
        name="measure.bytes_of_axpy",
        task=(
            "z = 2 * x + y, in float32, each of the three with 67,108,864 numbers. How many bytes must move between "
            "the GPU and its memory, at least?"
        ),
        answer=3 * 4 * 2**26,
        solution="Read x, read y, write z: 3 passes over 67,108,864 numbers of 4 bytes: 805,306,368 bytes.",
        hints=(
            "Count the passes over memory, not the operations: what is read, what is written?",
            "Two tensors are read and one is written, each of them once.",
            "A float32 number has 4 bytes: passes * numbers * 4.",
        ),
        mistakes={
            3 * 2**26: "Those are numbers; each has 4 bytes in float32.",
            2 * 4 * 2**26: "That is two passes. x and y are read, and z is written as well.",
            4 * 4 * 2**26: "That is four passes, one too many: 2 * x need not be written before y is added.",
            4 * 2**26: "That is one pass over one tensor; there are three tensors.",
        },
        unit="bytes",
    ),
    Question(
        name="measure.step_of_launches",
        task=(
            "A step of a small model launches 700 kernels. The host needs 6 us for each launch, and all of them "
            "together keep the GPU busy for 2 ms. How many milliseconds does the step take, at least?"
        ),
        answer=4.2,
        solution="Host and GPU work at the same time, so the slower one decides: 700 * 6 us = 4.2 ms, more than 2 ms.",
        hints=(
            "The host launches a kernel and goes on to the next while the GPU works.",
            "How long does the host need for all of its launches?",
            "They work at the same time: take the larger of the two times.",
        ),
        mistakes={
            2.0: "The GPU is busy for 2 ms, but it waits for launches in between: the host needs longer.",
            6.2: "That adds the two, as if the GPU waited until all was launched. They work at the same time.",
            0.006: "That is one launch. There are 700.",
        },
        tolerance=0.01,
        unit="ms",
    ),
    Question(
        name="measure.ridge_of_a_matmul",
        task=(
            "A card reaches 1,000 GB/s and, in float16 on its tensor cores, 160 TFLOP/s. An N × N by N × N product "
            "takes 2 N³ operations on 3 N² numbers of 2 bytes. From which N on are the tensor cores its limit?"
        ),
        answer=480,
        solution="The ceilings meet at 160e12 / 1000e9 = 160 operations a byte; 2 N³ / (6 N²) = N / 3, so N = 480.",
        hints=(
            "At how many operations a byte do the two ceilings meet?",
            "160e12 operations a second over 1000e9 bytes a second. And how many operations a byte has the product?",
            "2 N³ operations over 6 N² bytes are N / 3.",
        ),
        mistakes={
            160: "That is where the ceilings meet, in operations a byte. The product has N / 3 of those.",
            240: "Each number has 2 bytes: 2 N³ / (3 N² * 2) is N / 3, not 2 N / 3.",
            960: "A multiply-add counts as two operations here: 2 N³, not N³.",
            53: "N / 3 = 160 gives N = 3 * 160, not 160 / 3.",
        },
        tolerance=0.01,
    ),
    Question(
        name="measure.what_was_timed",
        task=(
            "A stopwatch that does not wait shows the same few microseconds for copies of 1 MiB and of 512 MiB. "
            "What did it time? One word."
        ),
        answer=("launch", "the launch", "launching", "launches"),
        solution="The launch: the host hands the work over and goes on, however much work it is.",
        hints=(
            "What does the host do, and what does the GPU do?",
            "The call returns before the copy has begun.",
            "Handing work over to the GPU is called a l...",
        ),
        mistakes={
            "copy": "A copy of 512 times as many bytes would take longer.",
            "cache": "512 MiB fit into no cache, and the time did not change.",
            "bandwidth": "Then 512 times the bytes would show 512 times the time.",
            "noise": "It shows the same each time: it is a real cost, of something else than the copy.",
        },
    ),
]
