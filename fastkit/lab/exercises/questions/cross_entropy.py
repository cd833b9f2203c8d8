"""Questions of notebook 11: the size of the logits, their gradient, the smallest part that keeps the units busy."""

from fastkit.lab.exercises.question import Question


def _gib(tokens: int, vocabulary: int, itemsize: int) -> float:
    return tokens * vocabulary * itemsize / 2**30


QUESTIONS = [
    Question(
        name="cross_entropy.logits_of_qwen",
        task=(
            "Qwen2.5-7B has a vocabulary of 152,064. How many GiB do the logits of 2 sequences of 4,096 tokens take in "
            "bf16? Give it to 2%."
        ),
        answer=_gib(8192, 152064, 2),
        tolerance=0.02,
        unit="GiB",
        solution="2 * 4,096 * 152,064 numbers of 2 bytes are 2.49e9 bytes, 2.32 GiB: a logit for each token and word.",
        hints=(
            "Every token has a logit for each word of the vocabulary.",
            "2 * 4,096 * 152,064 numbers.",
            "Times 2 bytes, divided by 2**30.",
        ),
        mistakes={
            _gib(8192, 152064, 2) * 2**30 / 1e9: "those are GB, 1e9 bytes; a GiB has 2**30",
            _gib(8192, 152064, 4): "that is in fp32; a bf16 number has 2 bytes",
            _gib(4096, 152064, 2): "that is one sequence; there are two",
            _gib(8192, 152064, 1): "you counted a byte for each number; bf16 has 2",
            _gib(8192, 3584, 2): "those are the hidden states; a token has a logit for each word of the vocabulary",
        },
    ),
    Question(
        name="cross_entropy.gradient_of_the_label",
        task=(
            "A row's probabilities are 0.5, 0.25 and 0.25, and its label is the first. The loss is the mean over 4 "
            "rows. What is the gradient with respect to the label's logit?"
        ),
        answer=-0.125,
        tolerance=0.001,
        solution="(p - 1) / 4 = (0.5 - 1) / 4 = -0.125: the loss falls as that logit grows.",
        hints=(
            "dlogits = (p - [column = label]) * dloss.",
            "The mean over 4 rows gives each of them dloss = 1 / 4.",
            "(0.5 - 1) / 4.",
        ),
        mistakes={
            -0.5: "that is for the sum; the mean over 4 rows divides it by 4",
            0.5: "that is p; the label's column has 1 less, and the mean divides by 4",
            0.125: "look at the sign: a larger logit of the label makes the loss smaller",
            -2.0: "-1 / p is the derivative by the probability; by the logit it is p - 1, and the mean divides by 4",
            -1 / 6: "there are 4 rows to divide by, not 3 columns",
        },
    ),
    Question(
        name="cross_entropy.smallest_part",
        task=(
            "A card reaches 160 TFLOP/s in bf16 and copies at 900 GB/s. A part of r rows multiplies with a weight of "
            "32,000 x 4,096 bf16 numbers, which it must read from memory. From how many rows on is the arithmetic the "
            "limit, not the reading of the weight? Give it to 3%."
        ),
        answer=160e12 / 900e9,
        tolerance=0.03,
        unit="rows",
        solution=(
            "Each weight, 2 bytes, is used for r multiply-adds, 2 r operations: r operations a byte. The card's ridge "
            "is at 160e12 / 900e9 = 178 operations a byte, so from 178 rows on. The size of the weight cancels."
        ),
        hints=(
            "How many operations does one number of the weight serve, if there are r rows? And how many bytes is it?",
            "2 r operations for 2 bytes: r operations a byte.",
            "The arithmetic is the limit from the ridge on: operations a second divided by bytes a second.",
        ),
        mistakes={
            2 * 160e12 / 900e9: "a multiply-add is two operations: 2 r of them for the 2 bytes of a weight",
            160e12 / 900e9 / 2: "a bf16 number has 2 bytes, and it serves 2 r operations: r a byte",
            900 / 160: "that is bandwidth by arithmetic, the other way round, and in mixed units",
            160 / 900: "1 TFLOP/s is 1e12 and 1 GB/s 1e9: the ratio of the bare numbers lacks a factor of 1,000",
            1024: "that is the library's part, which leaves a margin for every card; where does the arithmetic begin?",
        },
    ),
]
