"""Questions of notebook 10: transfers of fused operations, RoPE's backward, what is kept."""

import math

from fastkit.lab.exercises.question import Question

QUESTIONS = [
    Question(
        name="fusion.three_operations",
        task=(
            "y = relu(a * b + c), all of the same large shape and dtype, in three launches: a product, a sum, a relu. "
            "How many times fewer bytes does one fused launch move?"
        ),
        answer=2,
        solution="The product moves 3 tensors, the sum 3, relu 2: 8. Fused it is a, b, c and y: 4. 8 / 4 = 2.",
        hints=(
            "Count what each launch reads and writes: the product reads two tensors and writes one.",
            "Apart: 3 + 3 + 2.",
            "Fused: three inputs are read, one result is written.",
        ),
        mistakes={
            3: "that is the number of launches; bytes are what counts for large tensors",
            8: "those are the transfers of the three launches; divide by those of the fused one",
            4: "those are the transfers of the fused launch; how many are the others'?",
            8 / 3: "the fused launch has three inputs and a result to write: 4 transfers",
            2.25: "relu reads one tensor and writes one: 2 transfers, not 3",
        },
    ),
    Question(
        name="fusion.turned_back",
        task=(
            "A pair of RoPE has theta = 0.01, and its token stands at position 50. Its gradient is (dy1, dy2) = "
            "(0, 1). What is dx1? Give it to 1%."
        ),
        answer=math.sin(0.5),
        tolerance=0.01,
        solution="The angle is 50 * 0.01 = 0.5. dx1 = dy1 * cos + dy2 * sin = sin(0.5) = 0.479.",
        hints=(
            "The angle is the position times theta.",
            "The backward multiplies by the transposed matrix: its first row is (cos, sin).",
            "dx1 = dy1 * cos(0.5) + dy2 * sin(0.5).",
        ),
        mistakes={
            -math.sin(0.5): "that is the forward's first row, (cos, -sin): the backward has the transposed matrix",
            math.cos(0.5): "that is dx2; dx1 takes dy2 times the sine",
            math.sin(50): "the angle is the position times theta, 0.5",
            math.sin(0.01): "that is the angle at position 1; this token stands at 50",
            math.sin(math.radians(0.5)): "the angle is in radians, as tl.sin and torch.sin take it",
        },
    ),
    Question(
        name="fusion.kept_by_qwen",
        task=(
            "Qwen2.5-7B has 28 layers with an intermediate size of 18,944. How many GiB do gate and up of all layers "
            "keep in bf16 for 4,096 tokens?"
        ),
        answer=2 * 2 * 18944 * 4096 * 28 / 2**30,
        tolerance=0.01,
        unit="GiB",
        solution="2 tensors * 2 bytes * 18,944 * 4,096 tokens * 28 layers = 8.09 GiB.",
        hints=(
            "Two tensors, each of 18,944 numbers for each token, of 2 bytes.",
            "All layers wait at once: 28 times.",
            "A GiB has 2**30 bytes.",
        ),
        mistakes={
            2 * 18944 * 4096 * 28 / 2**30: "gate and up are two tensors, of 2 bytes a number each",
            3 * 2 * 18944 * 4096 * 28 / 2**30: "silu is not kept by the fused operation: two tensors",
            4 * 2 * 18944 * 4096 * 28 / 2**30: "that is what eager keeps of the MLP; asked is gate and up",
            2 * 2 * 18944 * 4096 / 2**30: "that is one layer; all 28 keep theirs until the backward comes to them",
            2 * 2 * 18944 * 4096 * 28 / 1e9: "that is in GB; a GiB has 2**30 bytes",
        },
    ),
]
