"""What every picture is drawn on: the figure that shows itself, the style, the colours and what they mean."""

import base64
import functools
import io
import textwrap
from collections.abc import Callable
from pathlib import Path

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

STYLE = Path(__file__).parent.parent / "fastkit.mplstyle"
WIDTH = 9.0  # inches; at the style's 100 dots an inch, a notebook's width
TITLE_CHARACTERS, TITLE_INCHES = 92, 0.22  # of a line of the headline
LINE_CHARACTERS, LINE_INCHES = 116, 0.185  # of a line of plain text
CAPTION_CHARACTERS = 128
MARGIN = 0.08  # inches left free below: the layout of axes that keep their shape can be some dots off

BLUE, ORANGE, VERMILION = "#0072B2", "#E69F00", "#D55E00"
INK, GREY, FAINT = "#222222", "#767676", "#DDDDDD"

# What a filling means, in every picture. Two of them differ in lightness or in hatch, so they do in grey as well.
GOOD = dict(facecolor=BLUE, edgecolor="white")
BAD = dict(facecolor=ORANGE, edgecolor="black", hatch="////")
EMPTY = dict(facecolor="white", edgecolor=GREY)
OFF = dict(facecolor="#EEEEEE", edgecolor=GREY, hatch="xxx")
OTHER = dict(facecolor="#C8C8C8", edgecolor="black", hatch="....")
TINTS = ("#BFDFF3", "#FFFFFF", "#F6DDA8", "#D9D9D9")  # behind black text


class Picture(Figure):
    """A figure that shows itself in a notebook, sharp, 900 pixels wide.

    It belongs to no pyplot session: nothing to close, and nothing left behind.
    """

    headline = ""

    def _repr_mimebundle_(self, include=None, exclude=None):
        width, height = (round(inches * self.dpi) for inches in self.get_size_inches())
        data = {"image/png": base64.b64encode(self.png()).decode(), "text/plain": repr(self)}
        return data, {"image/png": {"width": width, "height": height, "alt": self.headline}}

    def png(self) -> bytes:
        """The picture as a PNG file."""
        buffer = io.BytesIO()
        with style.context(STYLE, after_reset=True):
            self.savefig(buffer, format="png")
        return buffer.getvalue()

    def __repr__(self) -> str:
        return f"<picture: {self.headline}>"


def picture(draw: Callable[..., Picture]) -> Callable[..., Picture]:
    """Make a function draw in our style, whatever style its caller has set."""

    @functools.wraps(draw)
    def drawn(*args, **named) -> Picture:
        with style.context(STYLE, after_reset=True):
            figure = draw(*args, **named)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # every part has its place now, and keeps it however often it is shown
        return figure

    return drawn


def sheet(headline: str, height: float, subtitle: str = "", caption: str = "") -> tuple[Picture, Axes]:
    """A picture with one set of axes, `height` inches with their labels, under a headline: what there is to see."""
    figure = blank(headline, height, subtitle, caption)
    return figure, figure.add_subplot()


def blank(headline: str, height: float, subtitle: str = "", caption: str = "") -> Picture:
    """A picture of `height` inches without axes, and above them the headline. The caption: where numbers come from."""
    title, more = (wrapped(text, size) for text, size in ((headline, TITLE_CHARACTERS), (subtitle, LINE_CHARACTERS)))
    below = wrapped(caption, CAPTION_CHARACTERS)
    title_inches = 0.1 + TITLE_INCHES * len(title.splitlines())
    top = title_inches + LINE_INCHES * len(more.splitlines())
    bottom = MARGIN + LINE_INCHES * len(below.splitlines())
    total = top + height + bottom
    figure = Picture(figsize=(WIDTH, total))
    FigureCanvasAgg(figure)  # which knows how large text is
    figure.headline = headline
    figure.get_layout_engine().set(rect=(0, bottom / total, 1, height / total))
    figure.text(0.01, 1 - 0.07 / total, title, va="top", fontsize="large", fontweight="bold")
    figure.text(0.01, 1 - title_inches / total, more, va="top")
    figure.text(0.99, 0.04 / total, below, ha="right", va="bottom", fontsize=9, color=GREY)
    return figure


def wrapped(text: str, size: int) -> str:
    """`text` in lines of `size` characters; its own line breaks stay."""
    return "\n".join(textwrap.fill(line, size) for line in text.split("\n") if line)


@picture
def unknown(what: str, why: str, subtitle: str = "", caption: str = "") -> Picture:
    """The picture of what is not known: it says why."""
    lines = wrapped(f"unknown: {why}", LINE_CHARACTERS)
    height = 0.2 + LINE_INCHES * len(lines.splitlines())
    figure = blank(f"{what}: unknown", height, subtitle, caption)
    figure.set_layout_engine("none")  # there are no axes
    bottom = LINE_INCHES * len(wrapped(caption, CAPTION_CHARACTERS).splitlines())
    figure.text(0.01, (bottom + 0.08) / figure.get_figheight(), lines, va="bottom")
    return figure


def box(axes: Axes, x: float, y: float, width: float, height: float, gid: str, **look) -> Rectangle:
    """A rectangle; `gid` says what it stands for."""
    return axes.add_patch(Rectangle((x, y), width, height, gid=gid, **look))


def key(figure: Figure, meanings: dict[str, dict]) -> None:
    """What fillings mean, in a row at the bottom."""
    patches = [Patch(label=meaning, **{**look, "edgecolor": "black"}) for meaning, look in meanings.items()]
    figure.legend(handles=patches, loc="outside lower left", ncols=len(patches), handlelength=1.6)


def plural(count: float, noun: str) -> str:
    """ "1 sector", "32 sectors" """
    ending = "" if count == 1 else "es" if noun.endswith(("s", "ch", "x")) else "s"
    return f"{count:,.10g} {noun}{ending}"


def about(access) -> str:
    """Which access of a kernel a picture is of: an Access's or SharedAccess's kind, line and source."""
    name = getattr(access, "argument", "") or getattr(access, "operation", "")
    what = f"{access.kind} {name}".rstrip()
    if not access.line:
        return what
    text = f"{what}, line {access.line}: {access.source.partition('  #')[0]}"
    return text if len(text) <= LINE_CHARACTERS else f"{text[: LINE_CHARACTERS - 2]} …"
