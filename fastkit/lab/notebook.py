"""What the notebooks share: choosing the lane before Triton is imported, showing source, small tables."""

import inspect
import os
import sys
import textwrap

from fastkit.errors import FastkitError, show_plain_warnings


def start(interpret: bool = True) -> str:
    """Choose this kernel's lane, to be called in a notebook's first cell; returns "gpu" or "cpu".

    Warnings are shown without the source line that raised them, and Hugging Face's progress bars, which leave empty
    widgets behind in a saved notebook, are left out.

    Without a GPU, `interpret` makes the Triton kernels run in Triton's interpreter, at sizes to learn on. That is
    decided when Triton is first imported, so a notebook whose kernel did so already must be restarted.
    """
    show_plain_warnings()
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")  # read when those packages are imported
    import torch

    if torch.cuda.is_available():
        return "gpu"
    if interpret and os.environ.get("TRITON_INTERPRET") != "1":
        if "triton.language" in sys.modules:
            raise FastkitError("Triton was imported before start(): restart the notebook's kernel and run from the top")
        os.environ["TRITON_INTERPRET"] = "1"
    return "cpu"


def show_source(*objects):
    """The library's own source of functions, kernels and classes, highlighted: what runs is what is shown."""
    from IPython.display import Code

    texts = [textwrap.dedent(inspect.getsource(getattr(o, "fn", o))) for o in objects]
    return Code("\n\n".join(texts), language="python")


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

    return html.escape(f"{value:,.3f}" if isinstance(value, float) else str(value)).replace("\n", "<br>")
