"""What the notebooks share: choosing the lane before Triton is imported, showing source, small tables."""

import difflib
import inspect
import os
import sys
import textwrap

from fastkit.errors import FastkitError, show_plain_warnings

LANES = {
    "gpu": "kernels are compiled for this card and timed on it",
    "cpu": "kernels run in Triton's interpreter, at small sizes; numbers that need a GPU are shown as recorded",
    "references": "operations run as their torch references; numbers that need a GPU are shown as recorded",
}


def start(interpret: bool = True) -> str:
    """Choose this kernel's lane, to be called in a notebook's first cell; says what it is and returns "gpu" or "cpu".

    Warnings are shown without the source line that raised them, and Hugging Face's progress bars, which leave empty
    widgets behind in a saved notebook, are left out.

    Without a GPU, `interpret` makes the Triton kernels run in Triton's interpreter, at sizes to learn on. That is
    decided when Triton is first imported, so a notebook whose kernel did so already must be restarted.
    """
    show_plain_warnings()
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")  # read when those packages are imported
    import torch

    gpu = torch.cuda.is_available()
    if not gpu and interpret and os.environ.get("TRITON_INTERPRET") != "1":
        if "triton.language" in sys.modules:
            raise FastkitError("Triton was imported before start(): restart the notebook's kernel and run from the top")
        os.environ["TRITON_INTERPRET"] = "1"
        import fastkit.kernels.common  # noqa: F401  mends what Triton 3.6's interpreter lacks, for kernels of yours too
    print(_here(gpu, interpret))
    return "gpu" if gpu else "cpu"


def place() -> str:
    """Where this Python runs: "Colab", "Kaggle", "Jupyter" or "plain Python"."""
    if "COLAB_RELEASE_TAG" in os.environ or "google.colab" in sys.modules:
        return "Colab"
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "Kaggle"
    return "Jupyter" if "ipykernel" in sys.modules else "plain Python"


def _here(gpu: bool, interpret: bool) -> str:
    from fastkit.lab.device import card, versions

    found, installed = card(), versions()
    kind = "gpu" if gpu else "cpu" if interpret and installed["triton"] != "missing" else "references"
    lines = [
        f"lane   {'gpu' if gpu else 'cpu'}: {LANES[kind]}",
        f"place  {place()}, Python {installed['python']}, torch {installed['torch']}, triton {installed['triton']}",
        f"card   {found['name']}, {found['arch']}" if gpu else f"card   no GPU; the CPU is {found['name']}",
    ]
    return "\n".join(lines)


def show_source(*objects):
    """The library's own source of functions, kernels and classes, highlighted: what runs is what is shown."""
    from IPython.display import Code

    return Code(_text(objects), language="python")


def show_step(before, after):
    """What a rung changes: the source of `after`, a function or kernel, beside `before`'s, as a diff of all its lines.

    Either may be a tuple, of a kernel and its launch, say.
    """
    from IPython.display import Code

    texts = [_text(objects if isinstance(objects, tuple) else (objects,)).splitlines() for objects in (before, after)]
    lines = list(difflib.unified_diff(*texts, n=max(map(len, texts)), lineterm=""))[3:]  # but for the files' names
    return Code("\n".join(lines) or "no line differs", language="diff")


def _text(objects) -> str:
    sources = [textwrap.dedent(inspect.getsource(getattr(o, "fn", o))).rstrip() for o in objects]
    return "\n\n\n".join(sources)


def table(rows: list[dict]):
    """A table of `rows`, one dict a row, with its columns in the order of the first."""
    from IPython.display import HTML

    columns = list(rows[0])
    head = "".join(f"<th style='text-align:left'>{column}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td style='text-align:left'>{_cell(row[column])}</td>" for column in columns) + "</tr>"
        for row in rows
    )
    return HTML(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def _cell(value) -> str:
    import html

    return html.escape(_decimals(value) if isinstance(value, float) else str(value)).replace("\n", "<br>")


def _decimals(value: float) -> str:
    """Three digits after the point, but one from 100 on, and none from 1,000 on."""
    return f"{value:,.{3 if abs(value) < 100 else 1 if abs(value) < 1000 else 0}f}"
