"""Questions of notebook 12: what scores take, the scaling of sums, blocks that nobody sees, packed sequences."""

import math

from fastkit.lab.exercises.question import Question

DECAY = math.exp(2 - 4)  # of what was summed against 2, when a score of 4 comes


def _blocks() -> int:
    from fastkit.lab.plots.attention import score_blocks_of

    return len(score_blocks_of(1024, 128, 64))


QUESTIONS = [
    Question(
        name="flash_attention.kept_for_the_backward",
        task=(
            "A layer that writes its probabilities keeps them for the backward: one number of 2 bytes for each query, "
            "key and head. How many GiB is that in one layer with 32 heads, for one sequence of 8,192 tokens?"
        ),
        answer=32 * 8192**2 * 2 / 2**30,
        solution="32 heads * 8192 queries * 8192 keys * 2 bytes = 4 GiB, in each of a model's layers.",
        hints=(
            "How many pairs of a query and a key does one head have?",
            "8192 * 8192 pairs a head, 32 heads.",
            "Times 2 bytes, over 2**30.",
        ),
        mistakes={
            8: "A probability in 16 bits has 2 bytes, not 4.",
            0.125: "That is one head; there are 32.",
            2: "That would be the pairs that a causal mask leaves; a matrix in memory has a place for the others too.",
            4 * 2**30: "Those are bytes; 2**30 of them are a GiB.",
            32 * 8192 * 2 / 2**30: "That is a number for each query. A probability belongs to a query and a key.",
        },
        unit="GiB",
    ),
    Question(
        name="flash_attention.a_larger_score",
        task=(
            "So far a query's largest score is 2, its row_sum 3 and its acc, of one number a value, 6. The next block "
            "holds one key, with a score of 4 and the value 10. What is o after it? Give it to 1%."
        ),
        answer=(6 * DECAY + 10) / (3 * DECAY + 1),
        tolerance=0.01,
        solution=(
            "decay = exp(2 - 4) = 0.135. acc = 6 * 0.135 + 1 * 10 = 10.81, row_sum = 3 * 0.135 + 1 = 1.41, and "
            "o = 10.81 / 1.41 = 7.69: between the old mean, 2, and the new value, 10."
        ),
        hints=(
            "The new score is the largest: its p is exp(4 - 4) = 1. What becomes of the sums against 2?",
            "Both, acc and row_sum, shrink by exp(2 - 4). Then the new key is added to both.",
            "o = (6 * exp(-2) + 10) / (3 * exp(-2) + 1)",
        ),
        mistakes={
            16 / 4: "nothing was scaled: acc and row_sum were taken against 2, the new key against 4",
            16 / (3 * DECAY + 1): "row_sum was scaled, acc was not: it, too, was summed against the old maximum",
            (6 * DECAY + 10) / 4: "acc was scaled, row_sum was not: it, too, was summed against the old maximum",
            (6 / DECAY + 10) / (3 / DECAY + 1): "what was summed must shrink, for the new maximum is larger",
            6 * DECAY + 10: "that is acc; the division by row_sum is missing",
            (6 + 10 / DECAY) / 4: "a p of exp(4 - 2) = 7.4 goes into both sums, not into acc alone",
        },
    ),
    Question(
        name="flash_attention.blocks_of_a_causal_head",
        task=(
            "A causal head has 1,024 queries and keys. A program keeps 128 queries and walks over blocks of 64 keys "
            "as far as its last query sees. How many blocks of keys do the head's programs load, all together?"
        ),
        answer=_blocks,
        solution="Program i sees the keys before 128 (i + 1), which are 2 (i + 1) blocks: 2 (1 + 2 + ... + 8) = 72.",
        hints=(
            "How many programs are there, and how many blocks does the first of them load?",
            "8 programs. The first one's last query is number 127: it sees 2 blocks of 64 keys. The next one sees 4.",
            "2 + 4 + 6 + ... + 16",
        ),
        mistakes={
            128: "That is all 8 * 16 blocks of the square. Most programs stop long before the last key.",
            64: "Half of the square is a little too few: the blocks across the diagonal are loaded as well.",
            36: "That counts blocks of 128 keys; they have 64.",
            56: "The blocks across the diagonal are seen in part: they are loaded too, and masked.",
            16: "That is the last program alone.",
            72 * 2: "K and V each have so many blocks; count blocks of keys.",
        },
    ),
]
