import triton
import triton.language as tl


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    row, cols = tl.program_id(0), tl.arange(0, BLOCK_N)
    mask = cols < N
    gate = tl.load(gate_ptr + row * N + cols, mask=mask).to(tl.float32)
    up = tl.load(up_ptr + row * N + cols, mask=mask).to(tl.float32)
    tl.store(out_ptr + row * N + cols, gate / (1 + tl.exp(-gate)) * up, mask=mask)


def swiglu_forward(gate, up, out):
    M, N = gate.shape
    swiglu_kernel[(M,)](gate, up, out, N, BLOCK_N=triton.next_power_of_2(N))
