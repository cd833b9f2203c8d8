"""What the block simulator saw: which program's lanes touch which numbers, and how often rows travel."""

from collections.abc import Mapping, Sequence

from fastkit.errors import FastkitError
from fastkit.lab.blocks import Run, Tensor
from fastkit.lab.plots.paper import BAD, EMPTY, GOOD, GREY, INK, OFF, Picture, box, key, picture, plural, sheet

LANES_NUMBERED = 40  # up to which lanes carry their place in the tensor
SMALL = 0.1  # of a transfer: what moves less is not drawn


@picture
def programs(run: Run, tensor: str) -> Picture:
    """The lanes of each program over the numbers of `tensor` that they load or store, in a program's last access to it.

    Raises FastkitError where the launch never touched a tensor of that name.
    """
    last = {access.program: access for access in run.accesses if access.tensor.name == tensor}
    if not last:
        touched = ", ".join(dict.fromkeys(access.tensor.name for access in run.accesses)) or "nothing"
        raise FastkitError(f"no program touched {tensor!r}: this launch touched {touched}")
    size = next(iter(last.values())).tensor.size
    lanes = sum(access.mask.size for access in last.values())
    masked = lanes - sum(int(access.mask.sum()) for access in last.values())
    verb = next(iter(last.values())).kind
    idle = f"{plural(masked, 'lane')} {'is' if masked == 1 else 'are'} masked" if masked else "no lane is masked"
    headline = f"{plural(len(last), 'program')} {verb}{'s' if len(last) == 1 else ''} {plural(size, 'number')}; {idle}"
    reach = max(size, *(int(access.offsets.max()) + 1 for access in last.values()))
    figure, axes = sheet(headline, 0.75 + 0.34 * (len(last) + 1))
    for place in range(size):
        box(axes, place, 0, 1, 0.7, "number", **EMPTY)
        if reach <= LANES_NUMBERED:
            axes.text(place + 0.5, 0.35, str(place), ha="center", va="center", fontsize=9, color=INK)
    for row, access in enumerate(last.values(), 1):
        for place, active in zip(access.offsets.reshape(-1), access.mask.reshape(-1), strict=True):
            look = GOOD if active else OFF
            box(axes, int(place), row + 0.1, 1, 0.7, "lane" if active else "masked lane", **look)
            if reach <= LANES_NUMBERED:
                color = "white" if active else INK
                axes.text(place + 0.5, row + 0.45, str(place), ha="center", va="center", fontsize=9, color=color)
    axes.set(xlim=(0, reach), ylim=(len(last) + 1, -0.1))
    names = [f"program {', '.join(map(str, program))}" for program in last]
    axes.set_yticks([0.35, *(row + 0.45 for row in range(1, len(last) + 1))], [f"memory of {tensor}", *names])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    key(figure, {"lane at work": GOOD} | ({"masked lane" if masked == 1 else "masked lanes": OFF} if masked else {}))
    return figure


@picture
def transfers(rungs: Mapping[str, Run | Sequence[Run]], numbers: int) -> Picture:
    """How often a tensor of `numbers` numbers travels between memory and programs, in the launches of each rung.

    A box is one transfer of so many numbers, read or written; a gap separates kernels. Less than a tenth of a transfer,
    such as a number for each row, is left out.
    """
    moved = {name: _kernels([runs] if isinstance(runs, Run) else runs, numbers) for name, runs in rungs.items()}
    totals = {name: round(sum(part for kernel in kernels for *_, part in kernel)) for name, kernels in moved.items()}
    most, least = max(totals, key=totals.get), min(reversed(totals), key=totals.get)  # the last that has least
    headline = f"{most}: {plural(totals[most], 'transfer')}"
    headline += f"; {least}: {totals[least]}" if totals[least] < totals[most] else ""
    figure, axes = sheet(headline, 0.75 + 0.62 * len(moved))
    end = 0.0
    for y, kernels in enumerate(moved.values()):
        x = 0.0
        for kernel in kernels:
            start = x
            for verb, tensor, part in kernel:
                while part > SMALL:
                    width = min(part, 1.0)
                    look = GOOD if verb == "read" else BAD
                    box(axes, x, y - 0.3, width, 0.5, verb, **look)
                    axes.text(
                        x + width / 2, y - 0.05, f"{verb} {tensor}", ha="center", va="center", fontsize=9,
                        color="white" if verb == "read" else INK,
                        bbox=None if verb == "read" else dict(facecolor="white", edgecolor="none", pad=1.0),
                    )  # fmt: skip
                    x += width
                    part -= width
            axes.plot([start, x], [y + 0.27] * 2, color=GREY, linewidth=1.5, gid="kernel")
            end = max(end, x)
            x += 0.12
    axes.set(xlim=(0, end + 0.02), ylim=(len(moved) - 0.5, -0.5))
    axes.set_xticks([])
    axes.set_yticks(range(len(moved)), [f"{name}: {totals[name]}" for name in moved])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    key(figure, {"from memory": GOOD, "to memory": BAD})
    return figure


def _kernels(runs: Sequence[Run], numbers: int) -> list[list[tuple[str, str, float]]]:
    """For each launch: (read or write, tensor, how many times `numbers` numbers)."""
    found = []
    for run in runs:
        parts: dict[tuple[str, Tensor], int] = {}
        for access in run.accesses:
            place = "read" if access.kind == "load" else "write", access.tensor
            parts[place] = parts.get(place, 0) + int(access.mask.sum())
        found.append([(verb, tensor.name, count / numbers) for (verb, tensor), count in parts.items()])
    return found
