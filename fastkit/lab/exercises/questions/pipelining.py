"""Questions of notebook 08: stages, what they hide, what they cost."""

import itertools

from fastkit.lab.exercises.question import Question


def _stages() -> int:
    from fastkit.lab.plots.times import schedule

    def waits(stages):
        slots = schedule(900.0, 200.0, stages, 64)
        return any(slot.compute_start > before.compute_end for before, slot in itertools.pairwise(slots))

    return next(stages for stages in range(1, 16) if not waits(stages))


QUESTIONS = [
    Question(
        name="pipelining.shared_memory",
        task=(
            "A program multiplies tiles of 128 × 64 by 64 × 128 numbers in fp16, with num_stages=3, on sm_89, where a "
            "loop of S stages keeps S - 1 pairs of tiles. How much shared memory do they take, in KiB?"
        ),
        answer=(3 - 1) * (128 * 64 + 64 * 128) * 2 / 1024,
        solution="(128 * 64 + 64 * 128) numbers of 2 bytes are 32 KiB a pair; two pairs: 64 KiB.",
        hints=(
            "How many numbers does a pair of tiles have? How many bytes?",
            "128 * 64 + 64 * 128 numbers of 2 bytes are 32 KiB.",
            "S - 1 = 2 pairs.",
        ),
        mistakes={
            96: "That would be three pairs. On sm_89 a loop of 3 stages keeps two.",
            32: "That is one pair of tiles; two are kept.",
            65536: "Those are bytes; 1024 of them are a KiB.",
            128: "A number in fp16 has 2 bytes, not 4.",
        },
        unit="KiB",
    ),
    Question(
        name="pipelining.stages_to_hide",
        task=(
            "A tile's load takes 900 ns, its arithmetic 200 ns. With how many stages, at least, does the arithmetic of "
            "a long loop no longer wait?"
        ),
        answer=_stages,
        solution=(
            "With S stages, S - 1 loads are on their way at a time. One must arrive every 200 ns: "
            "900 / (S - 1) <= 200, so S - 1 = 5, and S = 6. `explore` in notebook 08 draws it."
        ),
        hints=(
            "With S stages, S - 1 loads are on their way. How often does one arrive?",
            "Every 900 / (S - 1) ns. How often must one arrive?",
            "900 / (S - 1) <= 200",
        ),
        mistakes={
            5: "5 loads on their way: that takes one stage more.",
            4.5: "So many loads must be on their way: take the next whole number, and a stage for the arithmetic.",
            2: "Two stages overlap one load with the arithmetic, and a load takes much longer than that.",
            4: "With 4 stages a load arrives every 300 ns, and the arithmetic takes 200.",
        },
    ),
    Question(
        name="pipelining.one_turn",
        task=(
            "A loop has a single turn: its load takes 600 ns, its arithmetic 200 ns. By how many ns does a second "
            "stage shorten it?"
        ),
        answer=0,
        solution="Nothing comes after the only tile, so nothing can be loaded while it is used: 800 ns either way.",
        hints=(
            "What would be loaded while the only tile is used?",
            "Draw it: pipeline(600, 200, stages=(1, 2), iterations=1).",
            "There is no next tile.",
        ),
        mistakes={
            200: "That is what overlap would win if there were another tile to load meanwhile.",
            600: "A load can be hidden behind the arithmetic of the tile before it. There is none before it.",
            400: "Halving needs two things that overlap; a single turn has one load and then one product.",
        },
        unit="ns",
    ),
]
