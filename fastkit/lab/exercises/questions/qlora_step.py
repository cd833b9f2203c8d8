"""Questions of notebook 16: a step's operations, what a plan keeps, how much of a step a faster product is."""

from fastkit.lab.exercises.question import Question

_COPY_MS = 1e3 * 192 * 2**20 / 25e9

QUESTIONS = [
    Question(
        name="qlora_step.operations",
        task=(
            "Full training takes 6 operations for each weight and token: 2 forward, 4 backward. How many do the frozen "
            "weights of a QLoRA step take, if the whole forward is computed again in the backward?"
        ),
        answer=6,
        solution="2 forward, 2 for the same again, 2 for dx. The 2 for dweight are not done: frozen weights have none.",
        hints=(
            "The backward of a product has two products: one for its input's gradient, one for its weight's.",
            "Frozen weights need the first alone.",
            "2 forward + 2 forward again + 2 backward.",
        ),
        mistakes={
            8: "the gradient of a frozen weight is computed by nobody: the backward has 2, not 4",
            4: "that is with everything kept; here the forward's 2 are done once more",
            3: "a multiply-add is two operations",
            2: "that is one pass, as in generation",
        },
    ),
    Question(
        name="qlora_step.kept_by_llama",
        task=(
            "Llama-2-7B has K = Q = N = 4,096 and I = 11,008. How many bytes does a layer keep for each token under "
            'the plan "recompute-mlp-qkv", in bf16? Numbers a row, such as lse, do not count.'
        ),
        answer=4 * 4096 + 2 * 4096,
        solution="It keeps x and x2, K numbers each, and o, Q numbers: 4 K + 2 Q bytes, 24,576. N and I are not in it.",
        hints=(
            "Look up in the table of plans what this one keeps.",
            "x, o and x2: three tensors of 4,096 numbers a token.",
            "Times 2 bytes a number.",
        ),
        mistakes={
            4 * 4096 * 3 + 4 * 11008: 'that is "keep"; this plan computes q, k, v, gate and up again',
            4 * 4096 * 3: 'that is "recompute-mlp"; this plan computes q, k and v again, too',
            2 * 4096: 'that is "recompute-all", which keeps x alone; this one attends once and keeps o and x2',
            3 * 4096: "those are numbers; in bf16 each has 2 bytes",
            8 * 4096 + 4 * 4096: "in bf16 a number has 2 bytes, not 4",
        },
    ),
    Question(
        name="qlora_step.half_of_sixty",
        task=(
            "60% of a step are products of frozen weights. In FP8 these take half as long. How many times faster is "
            "the step? Give it to 2%."
        ),
        answer=1 / (0.4 + 0.6 / 2),
        tolerance=0.02,
        solution="1 / (0.4 + 0.6 / 2) = 1.43: what is not made faster soon is most of what is left (Amdahl's law).",
        hints=(
            "Divide the time into what gets faster and what does not.",
            "0.4 stays, 0.6 becomes 0.3.",
            "1 / 0.7.",
        ),
        mistakes={
            2.0: "only the products are twice as fast; 40% of the step stay as they were",
            1.3: "30% of the time are saved: 1 / 0.7 is how many times faster that is, not 1 + 0.3",
            1 / (0.6 + 0.4 / 2): "it is the 60% that are halved",
            0.7: "that is the new time as a part of the old; how many times faster is it?",
        },
    ),
    Question(
        name="qlora_step.hidden_copy",
        task=(
            "A layer sends 192 MiB to the host over a link of 25 GB/s while the next layer's forward runs. From how "
            "many milliseconds on is that forward long enough to hide the copy? Give it to 3%."
        ),
        answer=_COPY_MS,
        tolerance=0.03,
        unit="ms",
        solution="192 * 2**20 bytes / 25e9 bytes a second = 8.05 ms. A shorter forward waits for the difference.",
        hints=(
            "The copy takes its bytes over the link's rate.",
            "192 MiB are 192 * 2**20 bytes; 25 GB/s are 25e9 bytes a second.",
            "8.05e-3 seconds.",
        ),
        mistakes={
            2 * _COPY_MS: "the way back happens in the backward, beside another layer's work",
            192e6 / 25e9 * 1e3: "a MiB has 2**20 bytes",
            25 / 192: "bytes over bytes a second, not the other way round",
        },
    ),
]
