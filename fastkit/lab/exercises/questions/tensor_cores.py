"""Questions of notebook 07: instructions that multiply tiles, and how one loses them."""

from fastkit.lab.exercises.question import Question

QUESTIONS = [
    Question(
        name="tensor_cores.instructions_of_a_warp",
        task=(
            "A program multiplies a tile of 128 × 32 by one of 32 × 128 numbers with 8 warps, on sm_89. One "
            "instruction of a warp multiplies 16 × 16 by 16 × 8. How many of them does each warp execute?"
        ),
        answer=128 * 128 * 32 // (16 * 8 * 16) // 8,
        solution="128 * 128 * 32 multiply-adds by 16 * 8 * 16 in an instruction are 256; 8 warps share them: 32 each.",
        hints=(
            "Count multiply-adds: of the program, and of one instruction.",
            "The program has 128 * 128 * 32, an instruction 16 * 8 * 16.",
            "256 instructions, among 8 warps.",
        ),
        mistakes={
            256: "That is the whole program's count; 8 warps share it.",
            16: "Each instruction goes 16 along k, not 32: k takes two of them.",
            64: "That would be right for 4 warps.",
            1: "An instruction multiplies 16 × 16 by 16 × 8, and this tile is larger.",
        },
    ),
    Question(
        name="tensor_cores.wasted",
        task=(
            "A tile of c has 8 rows and 64 columns. Its instructions make 16 × 8 numbers of c each. Which share of "
            "what they multiply is thrown away? Give a number from 0 to 1."
        ),
        answer=0.5,
        solution="Each instruction has 16 rows, of which 8 are wanted: half.",
        hints=(
            "How many rows does an instruction have, and how many of them are in the tile?",
            "Columns are no problem: 64 is a multiple of 8.",
            "1 - 8 / 16",
        ),
        mistakes={
            0: "The tile has 8 rows and an instruction has 16. What becomes of the rest?",
            0.875: "That would be 1 - 8 / 64. Columns are covered exactly; look at the rows.",
            0.75: "Half of the rows are lost, and none of the columns.",
            1: "Then nothing would be left. Half of the rows are wanted.",
        },
    ),
    Question(
        name="tensor_cores.fp8_instructions",
        task=(
            "A warp needs 16 instructions for its part of a tile in fp16, each 16 deep in k. In FP8 an instruction is "
            "32 deep. How many does the warp need then?"
        ),
        answer=8,
        solution="Numbers of half the size, twice as many of them in an instruction: 16 / 2 = 8.",
        hints=(
            "The tile stays as it is. What changes is how far an instruction goes along k.",
            "Twice as far along k.",
            "16 / 2",
        ),
        mistakes={
            16: "Each instruction does twice as much of k, so fewer do.",
            32: "An instruction grows; their number shrinks.",
            4: "Only k doubles; rows and columns stay 16 and 8.",
        },
    ),
]
