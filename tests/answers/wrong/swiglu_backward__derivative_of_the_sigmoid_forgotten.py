# fault: values
import triton
import triton.language as tl


@triton.jit
def swiglu_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, N, stride_gatem, stride_upm, BLOCK_N: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    dy = tl.load(dy_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gatem + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_upm + cols, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dsilu = sigmoid
    dgate = dy * up * dsilu
    dup = dy * (gate * sigmoid)
    tl.store(dgate_ptr + row * N + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + row * N + cols, dup.to(dup_ptr.dtype.element_ty), mask=mask)


def swiglu_backward(dy, gate, up, dgate, dup):
    M, N = dy.shape
    grid = (M, triton.cdiv(N, 1024))
    swiglu_kernel[grid](dy, gate, up, dgate, dup, N, gate.stride(0), up.stride(0), BLOCK_N=1024)
