"""Exercises of notebook 18: the five faults of its step, to be found and mended."""

from fastkit.lab.exercises.mend import Mend
from fastkit.lab.step_faults import FAULTS

EXERCISES = []
MENDS = [
    Mend(
        name="capstone.strided_access",
        task="Somewhere neighbouring lanes want numbers that are no neighbours. Let requests move what they ask for.",
        find=FAULTS["strided_access"],
        done="every load and store moves what it asks for, as far as the tracer can tell",
        hints=(
            "trace_launches tells for each load and store how many bytes move. Which call of the step moves too many?",
            "It is norm, in both of its loops: a lane takes neighbouring numbers, one a step (notebook 03).",
            "cols = step * LANES + lanes, in both loops; the store and the weight's load then follow.",
        ),
    ),
    Mend(
        name="capstone.bank_conflicts",
        task="Somewhere lanes queue at a bank of shared memory that the step laid out itself. Leave no conflict.",
        find=FAULTS["bank_conflicts"],
        done="no bank conflict where the step lays out shared memory itself",
        hints=(
            "A trace's `shared` lists accesses with their conflicts. Only in Gluon is the layout yours to choose.",
            "It is turn: its tile lies row after row (notebook 04). These numbers have 2 bytes, and a bank's word 4.",
            "max_phase=32 swizzles all 32 rows. Or pad each row by a word, which is two numbers.",
        ),
    ),
    Mend(
        name="capstone.lost_tensor_cores",
        task="Somewhere the plain units do what tensor cores could. Use WGMMA, with factors in fp16 and sums in fp32.",
        find=FAULTS["lost_tensor_cores"],
        done="all three products run on WGMMA, factors in fp16, sums in fp32",
        hints=(
            "multiplies(compile_launch(launch, 'sm_90')) names the instructions of a product (notebook 07).",
            "Two things keep multiply off: its factors are converted, and exact fp32 is asked for by name.",
            "Leave a and b as they come from memory, and drop input_precision. The sums are fp32 already.",
        ),
    ),
    Mend(
        name="capstone.needless_copy",
        task="Somewhere the step writes numbers to memory in fp32, or copies them, for no gain. Do without.",
        find=FAULTS["needless_copy"],
        done="no pass only copies, and no large tensor is in fp32",
        hints=(
            "passes shows what torch does between the kernels (notebook 09). Which of its operations compute nothing?",
            "It is gate, twice: before its kernel and after it. Where does the kernel convert anyway?",
            "Give the kernel hidden's halves as they are, chunk makes views, and an output in hidden's dtype.",
        ),
    ),
    Mend(
        name="capstone.synchronisation",
        task="Somewhere the host waits until the GPU has done all that it was given. Let it go on.",
        find=FAULTS["synchronisation"],
        done="the host waits nowhere",
        hints=(
            "account_of(...).waits has the place. Why must the host know a number there?",
            "It is clip: `if` needs a bool, and the bool lies on the GPU. Which factor would do in either case?",
            "dw.mul_((MOST / norm).clamp(max=1.0)): the factor stays on the GPU, and is 1 where nothing is to clip.",
        ),
    ),
]
