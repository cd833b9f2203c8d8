import triton
import triton.language as tl


@triton.jit
def dgate_kernel(dy_ptr, gate_ptr, up_ptr, dgate_ptr, N, stride_gatem, stride_upm, BLOCK_N: tl.constexpr):
    row, cols = tl.program_id(0), tl.arange(0, BLOCK_N)
    dy = tl.load(dy_ptr + row * N + cols, mask=cols < N, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gatem + cols, mask=cols < N, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_upm + cols, mask=cols < N, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    tl.store(dgate_ptr + row * N + cols, dy * up * (sigmoid + gate * sigmoid * (1.0 - sigmoid)), mask=cols < N)


@triton.jit
def dup_kernel(dy_ptr, gate_ptr, dup_ptr, N, stride_gatem, BLOCK_N: tl.constexpr):
    row, cols = tl.program_id(0), tl.arange(0, BLOCK_N)
    dy = tl.load(dy_ptr + row * N + cols, mask=cols < N, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gatem + cols, mask=cols < N, other=0.0).to(tl.float32)
    tl.store(dup_ptr + row * N + cols, dy * gate / (1.0 + tl.exp(-gate)), mask=cols < N)


def swiglu_backward(dy, gate, up, dgate, dup):
    M, N = dy.shape
    BLOCK_N = triton.next_power_of_2(N)
    dgate_kernel[(M,)](dy, gate, up, dgate, N, gate.stride(0), up.stride(0), BLOCK_N=BLOCK_N)
    dup_kernel[(M,)](dy, gate, dup, N, gate.stride(0), BLOCK_N=BLOCK_N)
