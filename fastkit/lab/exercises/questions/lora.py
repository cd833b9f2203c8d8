"""Questions of notebook 15: the size of an adapter, its gradients, who reads what."""

from fastkit.lab.exercises.question import Question

QUESTIONS = [
    Question(
        name="lora.size_of_an_adapter",
        task="An adapter of rank 8 beside a weight of 14336 × 4096. How many numbers are trained?",
        answer=8 * (14336 + 4096),
        solution="A is [8, 4096] and B [14336, 8]: 8 * (4096 + 14336) = 147,456.",
        hints=(
            "Write down the shapes of A and B.",
            "A is [r, K] and B is [N, r].",
            "8 * (14336 + 4096)",
        ),
        mistakes={
            14336 * 4096: "That is the weight, which stays frozen. Only A and B are trained.",
            8 * 4096: "That is A alone; B is trained, too.",
            8 * 14336: "That is B alone; A is trained, too.",
            8 * 14336 * 4096: "Rows and columns are added, not multiplied: A is [8, 4096], B is [14336, 8].",
            16 * (14336 + 4096): "A and B are both counted already; there is no factor of 2.",
        },
    ),
    Question(
        name="lora.gradient_of_the_first_step",
        task="Adapters begin with B = 0. The gradient of one of the two is all zeros in the first step: dA or dB?",
        answer=("dA", "A"),
        solution=(
            "dA = scaling * (dy @ B).T @ x has B as a factor and is zero. dB = scaling * dy.T @ (x @ A.T) has A, drawn "
            "at random, and is not: B moves first, and A from the second step on."
        ),
        hints=(
            "Look for B in both formulas.",
            "dA = scaling * (dy @ B).T @ x and dB = scaling * dy.T @ (x @ A.T).",
            "dy @ B is zero where B is.",
        ),
        mistakes={
            "dB": "dB = scaling * dy.T @ (x @ A.T) does not have B in it: what it needs is A, drawn at random.",
            "B": "B itself is zero; its gradient, scaling * dy.T @ (x @ A.T), is not.",
            "both": "Then nothing would ever be learned. Look for the factor B in each of them.",
            "neither": "One of them has B as a factor, and B is zero.",
        },
    ),
    Question(
        name="lora.readings_saved",
        task=(
            "q, k and v have an adapter each and share their input x. Plain products for all dA and dB read x again "
            "and again. How many of these readings does lora_gradients save?"
        ),
        answer=3 * 2 - 2,
        solution=(
            "Each adapter's x @ A.T and each dA read x: 3 * 2 = 6 readings. With the adapters stacked both take one: "
            "2 are left and 4 saved."
        ),
        hints=(
            "Which of the four products of an adapter's gradients have x in them?",
            "x @ A.T and (dy @ B).T @ x: two for each adapter.",
            "3 * 2 - 2",
        ),
        mistakes={
            2: "That many are left: x for all xA at once, and x for all dA at once.",
            6: "That many there are without stacking; two are left.",
            3: "Each adapter reads x for xA and again for dA: twice.",
            5: "One reading is not enough: dA needs all of dy first, and dB all of x @ A.T.",
        },
    ),
]
