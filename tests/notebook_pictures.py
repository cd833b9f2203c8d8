"""The pictures of notebooks/README.md, each notebook's first, made small.

python tests/notebook_pictures.py     writes them
"""

import base64
import io
from pathlib import Path

import nbformat
from PIL import Image
from prepare_notebooks import NOTEBOOKS

PICTURES = NOTEBOOKS[0].parent / "pictures"
WIDTH, COLOURS = 480, 64


def small_picture(notebook: Path) -> Image.Image:
    """The first picture among a notebook's outputs that shows something, WIDTH pixels wide."""
    for cell in nbformat.read(notebook, as_version=4).cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data and not data.get("text/plain", "").endswith(": unknown>"):
                picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
                return picture.resize((WIDTH, picture.height * WIDTH // picture.width), Image.Resampling.LANCZOS)
    raise ValueError(f"{notebook.name} has no picture among its outputs: execute it")


def write(folder: Path = PICTURES) -> None:
    folder.mkdir(exist_ok=True)
    for notebook in NOTEBOOKS:
        picture = small_picture(notebook).quantize(COLOURS, dither=Image.Dither.NONE)
        picture.save(folder / f"{notebook.stem}.png", optimize=True)


if __name__ == "__main__":
    write()
