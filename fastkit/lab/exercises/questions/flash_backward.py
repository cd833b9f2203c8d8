"""Questions of notebook 13: through the softmax, what is kept, how many products."""

from fastkit.lab.exercises.question import Question

QUESTIONS = [
    Question(
        name="flash_backward.through_the_softmax",
        task="A query sees three keys. Its p are 0.5, 0.25 and 0.25, its dp 6, 2 and 0. What is ds of the first?",
        answer=0.5 * (6 - (0.5 * 6 + 0.25 * 2)),
        solution="delta = 0.5 * 6 + 0.25 * 2 + 0.25 * 0 = 3.5, so ds = 0.5 * (6 - 3.5) = 1.25; all three add up to 0.",
        hints=(
            "ds = p * (dp - delta), with one delta for the whole query.",
            "delta is the sum of p * dp over the three keys.",
            "0.5 * (6 - 3.5)",
        ),
        mistakes={
            3: "that is p * dp: a larger first score also makes the other p smaller, which is what delta takes off",
            2.5: "that is dp - delta; how strongly a score moves its p is p itself",
            1.5: "p (1 - p) dp leaves out the other keys: the first score moves their p as well",
            0.5 * (6 - 8 / 3): "delta is the mean of dp weighted by p, not the plain mean",
            -1.25: "the sign is turned round: dp is above its mean, so that a larger score would raise the loss",
        },
    ),
    Question(
        name="flash_backward.kept_by_the_forward",
        task=(
            "Besides q, k, v and o the library's forward keeps one fp32 number for each query and head. How many MiB is"
            " that in one layer with 32 heads, for one sequence of 32,768 tokens?"
        ),
        answer=32 * 32768 * 4 / 2**20,
        solution="32 heads * 32768 queries * 4 bytes = 4 MiB, where p in 16 bits would be 64 GiB.",
        hints=(
            "lse [H, T]: how many numbers are that?",
            "32 * 32768 numbers of 4 bytes.",
            "Over 2**20.",
        ),
        mistakes={
            8: "delta need not be kept: the backward computes it from do and o, which are there",
            2: "lse is in fp32: 4 bytes",
            0.125: "that is one head; there are 32",
            65536: "that is p in 16 bits, the square that is not kept",
            256: "that is o, which the next layer's gradient keeps anyway; the question is what comes on top",
        },
        unit="MiB",
    ),
    Question(
        name="flash_backward.products",
        task=(
            "The two products of a forward, q kᵀ and p v, take 100 GFLOP. How many GFLOP do the products of the "
            "library's two backward kernels take?"
        ),
        answer=100 / 2 * (3 + 4),
        solution="A product takes 50. dq needs s, dp and ds k; dk and dv need s, dp, pᵀ do and dsᵀ q: 7 * 50 = 350.",
        hints=(
            "All products of attention are of one size, 50 GFLOP here. How many does each kernel compute?",
            "Both compute s and dp anew. Then dq needs one product more, dk and dv one each.",
            "3 + 4 products.",
        ),
        mistakes={
            250: "those are the five different ones; both kernels need s and dp, and each computes them for itself",
            200: "those are the four of a backward that kept p, and the two kernels would share dp",
            150: "that is the kernel for dq alone",
            300: "s is computed twice, but so is dp",
            400: "dq needs three products: s, dp, and ds k",
        },
        unit="GFLOP",
    ),
]
