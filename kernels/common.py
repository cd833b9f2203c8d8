"""What every kernel file shares: the import of Triton, where an operation runs, input checks, cost.

A kernel file says `from fastkit.kernels.common import tl, triton`. Where Triton is not installed (macOS, say) a
stand-in takes both names, so that the file still imports and its torch reference still works.
"""

import contextlib
import functools
from dataclasses import dataclass

import torch


def with_scalar_index(patch):
    """Triton 3.6's interpreter takes an array of one number for a scalar, which NumPy refuses from 2.4 on: `patch`, its
    `_patch_lang_tensor`, with the __index__ of later Tritons."""

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    return patched


try:
    import triton
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction
except ImportError as error:

    class _NoTriton:
        """Enough of `triton` and of `tl` to define a kernel; `on_triton` sees to it that none is ever launched."""

        constexpr = object

        @staticmethod
        def jit(kernel=None, **options):
            return kernel or (lambda kernel: kernel)

        constexpr_function = jit

    triton = tl = _NoTriton
    INTERPRETED = False
    TRITON_MISSING = str(error)
else:
    INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the kernels run on the CPU, in Python
    TRITON_MISSING = ""
    if INTERPRETED and not isinstance(tl.sum, InterpretedFunction):
        raise ImportError("TRITON_INTERPRET=1 was set after Triton had been imported: restart Python and set it first")
    if INTERPRETED:
        interpreter._patch_lang_tensor = with_scalar_index(interpreter._patch_lang_tensor)


@triton.jit
def fp32(number):
    """A float argument in fp32. A graph of torch.compile passes it in fp64, which spreads to all that it meets."""
    return tl.full([], number, tl.float32)


KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Cost:
    """The least an operation must do: bytes to and from the GPU's memory, and floating-point operations.

    Every input counts as read once and every output as written once, whatever a cache saves or a kernel wastes, so that
    bytes_moved / (bytes per second of the card) is the time to beat. An exp, rsqrt or division counts as one operation.
    """

    bytes_moved: int
    flops: int


def on_triton(op: str, name: str, x: torch.Tensor) -> bool:
    """Whether `op` runs its Triton kernels on `x` (True) or its torch reference (False), decided here and nowhere else.

    CUDA tensors (ROCm's too) run the kernels. CPU tensors run the reference or, under TRITON_INTERPRET=1, the kernels,
    interpreted; except in bfloat16, which Triton's interpreter truncates where a GPU rounds.
    """
    if x.device.type == "cuda":
        if TRITON_MISSING:
            raise NotImplementedError(
                f"{op}: {name} is on {x.device} but Triton cannot be imported ({TRITON_MISSING}); "
                "pip install triton (triton-windows on Windows), or pass CPU tensors to run the torch reference"
            )
        return True
    if x.device.type == "cpu":
        return INTERPRETED and x.dtype != torch.bfloat16
    raise NotImplementedError(
        f"{op}: {name} is on device {x.device}; move it to cuda (kernel) or cpu (torch reference)"
    )


def device_of(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """For launches: Triton launches on the current device, which need not be x's.

    A graph of torch.compile sets the device itself, and could not be traced through a change of it.
    """
    if torch.compiler.is_compiling() or x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def check_floats(op: str, **tensors: torch.Tensor) -> None:
    """Raise unless all `tensors` are float32, float16 or bfloat16 and lie on the first one's device."""
    first = next(iter(tensors))
    device = tensors[first].device if isinstance(tensors[first], torch.Tensor) else None
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} is a {type(tensor).__name__}; give a torch.Tensor")
        if tensor.dtype not in KERNEL_DTYPES:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; convert it to float32, float16 or bfloat16")
        if tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but {first} is on {device}; move one to the other")


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` [..., N] as [M, N], neighbours in a row being neighbours in memory; rows may lie any stride apart.

    A view, with no copy, for contiguous tensors and for column slices of them such as `stacked[..., :N]`. Every other
    layout (a transpose, an expanded scalar) is copied here.
    """
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@torch.compiler.assume_constant_result  # dynamo cannot trace the question to the driver
def architecture(device: torch.device) -> str:
    """What Triton compiles for on `device`, such as "sm_90" or "gfx942"; else "interpreter" or "no GPU"."""
    if INTERPRETED:
        return "interpreter"
    try:
        return _architecture(triton.runtime.driver.active, device)
    except RuntimeError:  # Triton found no driver
        return "no GPU"


@functools.cache  # a launch asks, and to ask the driver takes as long as a launch
def _architecture(driver, device: torch.device) -> str:
    with torch.cuda.device(device if device.type == "cuda" else -1):  # -1: leave the current device
        target = driver.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


SMS_WITHOUT_GPU = 4  # for the interpreter: enough to exercise several programs


def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of `device`; SMS_WITHOUT_GPU if it is no GPU."""
    return _sm_count(device) if device.type == "cuda" else SMS_WITHOUT_GPU


@functools.cache
def _sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
