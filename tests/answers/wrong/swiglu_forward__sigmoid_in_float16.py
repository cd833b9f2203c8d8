# fault: precision
import triton
import triton.language as tl


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, out_ptr, N, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    gate = tl.load(gate_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate).to(tl.float16).to(tl.float32) * up  # in fp32 up to the store, which rounds once
    tl.store(out_ptr + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


def swiglu_forward(gate, up, out):
    N = gate.numel()
    swiglu_kernel[(triton.cdiv(N, 1024),)](gate, up, out, N, BLOCK=1024)
