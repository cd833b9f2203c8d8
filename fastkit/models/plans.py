"""What a decoder layer keeps from its forward to its backward, and what it computes again instead.

The products are what costs, so each is computed again only where its result was not kept and the backward needs it; the
down projection's never is. What is elementwise (norms, RoPE, SwiGLU) is never kept: it costs less than the memory. For
M tokens, in bytes for each token and layer at 16 bits (Mistral-7B: hidden size K = 4096,
query columns Q = 4096, key columns N = 1024, intermediate size I = 14336; o comes with lse, 4 bytes a head):

    plan                  keeps                                bytes                  computes again
    "keep"                x, q, k, v, o, x2, gate, up          4 K + 4 Q + 4 N + 4 I  nothing
    "recompute-mlp"       x, q, k, v, o, x2                    4 K + 4 Q + 4 N        gate, up
    "recompute-mlp-qkv"   x, o, x2                             4 K + 2 Q              and q, k, v
    "recompute-all"       x                                    2 K                    and the attention, o's projection

"recompute-all" needs o's projection because the second half's input x2 is its result.

Any of them may send what it keeps to host memory (`keeping.py`): "recompute-mlp-qkv+offload" then holds next to nothing
of a layer on the device, and computes no more again than without. "leanest" is that with the MLP computed for a quarter
of the tokens at a time, so that gate and up of all tokens never exist, and no weight held for a second product.
"""

from dataclasses import dataclass, replace

from fastkit.errors import FastkitError

OFFLOAD = "+offload"


@dataclass(frozen=True)
class Plan:
    """What a layer keeps, where, and how much of it is computed at a time.

    qkv         keeps q, k and v
    attention   keeps the attention's o and lse, and the second half's input x2
    gate_up     keeps gate and up
    offload     sends all that is kept, but for numbers a row, to the host
    chunks      parts of the tokens that go through the MLP one after another; 1 with gate_up
    """

    name: str
    qkv: bool
    attention: bool
    gate_up: bool
    offload: bool = False
    chunks: int = 1

    @property
    def holds(self) -> bool:
        """Whether a weight that is written to compute something again is held until its gradient's product."""
        return self.chunks == 1


_ON_DEVICE = (
    Plan("keep", qkv=True, attention=True, gate_up=True),
    Plan("recompute-mlp", qkv=True, attention=True, gate_up=False),
    Plan("recompute-mlp-qkv", qkv=False, attention=True, gate_up=False),
    Plan("recompute-all", qkv=False, attention=False, gate_up=False),
)
_OFFLOADED = tuple(replace(plan, name=plan.name + OFFLOAD, offload=True) for plan in _ON_DEVICE)
PLANS = {plan.name: plan for plan in (*_ON_DEVICE, *_OFFLOADED, replace(_OFFLOADED[2], name="leanest", chunks=4))}


def plan_of(plan: str | Plan) -> Plan:
    """The plan of that name; raises FastkitError for another."""
    if isinstance(plan, Plan):
        return plan
    if plan not in PLANS:
        raise FastkitError(f"there is no plan {plan!r}: use one of {', '.join(PLANS)}")
    return PLANS[plan]
