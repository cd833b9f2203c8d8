"""Questions of notebook 18: what each planted fault costs, which nobody can say who has not found it."""

from fastkit.lab.exercises.question import Question

QUESTIONS = [
    Question(
        name="capstone.moved_per_asked",
        task="How many bytes does the worst load of the step move for each byte that it asks for?",
        answer=16,
        solution="norm's lanes stand 32 numbers of 2 bytes apart: each has a sector, 32 bytes, to itself and wants 2.",
        hints=(
            "A row of the tracer's table has KiB asked and KiB moved. One part of the step has rows that differ.",
            "The part is norm. How far apart are the numbers that neighbouring lanes load?",
            "A sector has 32 bytes and a number 2: 32 / 2.",
        ),
        mistakes={
            8: "That is the copy of notebook 03, in float32. These numbers have 2 bytes.",
            32: "That is how many sectors a request touches. It asks for 64 bytes in all.",
            1: "That is a part that has no fault. Look at the others.",
            2: "A sector goes to one lane here, not to sixteen.",
        },
    ),
    Question(
        name="capstone.turns",
        task="In how many turns do the banks serve the worst load of shared memory, of those that the step lays out?",
        answer=16,
        solution="A column's numbers lie 64 bytes apart, half a round of banks: 32 lanes stand at 2 banks, 16 at each.",
        hints=(
            "An access of a trace's `shared` has `degree`: turns for each that would do.",
            "The kernel in Gluon is the one whose layout is ours. It is in turn.",
            "A row of 32 numbers of 2 bytes fills 16 banks. How many banks do the lanes of a column touch?",
        ),
        mistakes={
            32: "That is a column of float32. A row of these numbers fills half of the banks, so a column lies in two.",
            15: "Those are the conflicts: the turns beyond the one that would do.",
            480: "Those are the conflicts of a whole program, in all of its loads.",
            1: "That is the store, whose lanes stand along a row.",
        },
    ),
    Question(
        name="capstone.instructions",
        task=(
            "In a turn of its loop, the product at fault executes 1,024 FMAs in each lane. How many WGMMA of "
            "64 × 64 × 16, executed by its four warps together, multiply as much?"
        ),
        answer=2,
        solution="4 warps of 32 lanes do 131,072 multiply-adds, a WGMMA of 64 * 64 * 16 does 65,536: two.",
        hints=(
            "Count multiply-adds: of all lanes of the program, and of one instruction.",
            "4 * 32 * 1,024 multiply-adds.",
            "By 64 * 64 * 16.",
        ),
        mistakes={
            1: "A WGMMA goes 16 along k, and a turn of this loop 32.",
            4: "Four warps execute one WGMMA together; it counts once.",
            64: "That would be one for each warp's lane; a program has 4 * 32 lanes.",
            512: "That is how many times fewer instructions there are.",
        },
    ),
    Question(
        name="capstone.copied",
        task=(
            "The part with the needless copies moves bytes in them and in its kernel. How many times as many are they, "
            "in all, as the kernel would have to move without?"
        ),
        answer=5,
        solution=(
            "For a number of a, two of hidden are read (4 bytes) and written (8), read again (8), a is written (4), "
            "read (4) and written (2): 30 bytes, where 4 + 2 would do."
        ),
        hints=(
            "The part is gate. Follow two numbers of hidden until one of a is written: who reads and writes what?",
            "torch reads 4 bytes and writes 8; the kernel reads 8 and writes 4; torch reads 4 and writes 2.",
            "30 bytes by 6.",
        ),
        mistakes={
            2: "The kernel alone moves twice as much. The two passes of torch come on top.",
            3: "Those are the bytes of torch's passes, by those that would do; the kernel's own are missing.",
            4: "One of the passes is missing: there is one before the kernel and one after it.",
            30: "Those are the bytes for a number of a. By how many would do?",
        },
    ),
    Question(
        name="capstone.who_waits",
        task="Which part makes the host wait?",
        answer="clip",
        solution="`if norm > MOST` needs a bool, and norm lies on the GPU: the host waits until it has been computed.",
        hints=(
            "account_of(...).waits, of the whole step, names the line.",
            "No .item() stands there. What else needs a number's value?",
            "An `if` on a tensor.",
        ),
        mistakes={
            "update": "Its lr is a number of Python's, which the host has already.",
            "combine": "float(factor) takes a number of Python's, not a tensor.",
            "gate": "It converts, which takes passes over memory, but nobody waits for them.",
            "norm": "It only launches a kernel. Which part decides something by a number?",
        },
    ),
]
