"""Numbers with units in a notebook's text, and whether the notebook or a recorded result that it uses gives them."""

import ast
import html
import json
import re
from pathlib import Path

import nbformat

from fastkit.lab.results import RESULTS

SHORT = r"ms|us|µs|μs|ns|(?<=\s)s|[KMGT]i?B/s|B/s|[GT]FLOP/s|[GT]?FLOPs?|[KMGT]i?B|MHz|GHz|W|%|×"
LONG = (
    "times|bytes?|bits?|sectors?|lines?|lanes?|warps?|banks?|conflicts?|requests?|instructions?|registers?|cycles?|"
    "clocks?|tokens?|threads?|programs?|launches|loads?|stores?|passes|turns?|operations?|numbers?|stages?|blocks?"
)
NUMBER = r"(?<![\w.,/^])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e-?\d+)?(?![\w.]*\d)"
SCALES = {"thousand": 3, "million": 6, "billion": 9}
WITH_UNIT = re.compile(
    rf"(?P<list>{NUMBER}(?:(?:\s*(?:,|–|/|×)\s*|,?\s+(?:and|or|to|of)\s+){NUMBER})*)"
    rf"(?:\s+(?P<scale>{'|'.join(SCALES)}))?"
    rf"(?:\s*(?P<short>{SHORT})(?![\w/]|-\w)|[\s-]+(?:(?!and\b|or\b|to\b)[a-z]+\s+)?(?P<long>{LONG})(?!\w))"
)


def unbacked(notebook: nbformat.NotebookNode, results: Path = RESULTS) -> list[str]:
    """The numbers with a unit in Markdown that nothing gives, each in its words: "8.5 TB/s".

    What gives a number: text that a cell has put out, the words above a picture, a number in the code, a row of a
    recorded result that the code names. It is given if it is the same when rounded to the digits written; 0.85 gives
    85%. Units are not converted.
    """
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    given = {number for source in code for number in _in_code(source)}
    given |= {number for cell in notebook.cells for output in cell.get("outputs", []) for number in _shown(output)}
    given |= {number for source in code for name in _names(source) for number in _recorded(results / f"{name}.json")}
    missing = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            missing += [
                words for words, number, place, unit in stated(cell.source) if not _has(given, number, place, unit)
            ]
    return missing


def stated(markdown: str):
    """(words, number, place of its last digit, unit) of each number with a unit, those of a list one by one."""
    for found in WITH_UNIT.finditer(_plain(markdown)):
        unit = found["short"] or found["long"]
        scale = 10.0 ** SCALES.get(found["scale"], 0)
        for number in re.findall(NUMBER, found["list"]):
            yield f"{number} {found['scale'] or ''} {unit}".replace("  ", " "), *_read(number, scale), unit


def _read(number: str, scale: float) -> tuple[float, float]:
    """A number and the place of its last digit that counts: 0.1 for 3.5; 100 for 16,300; 1 for 16."""
    digits = number.replace(",", "")
    value = float(digits) * scale
    mantissa, _, exponent = digits.partition("e")
    if "." in mantissa:
        return value, 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2])) * scale
    zeros = len(mantissa) - len(mantissa.rstrip("0"))
    return value, 10.0 ** (int(exponent or 0) + (zeros if zeros >= 2 else 0)) * scale


def _has(given: set[float], number: float, place: float, unit: str) -> bool:
    wanted = [(number, place), (number / 100, place / 100)] if unit == "%" else [(number, place)]
    return any(abs(one - value) <= 0.5 * step + 1e-9 * abs(value) for value, step in wanted for one in given)


def _plain(markdown: str) -> str:
    """Markdown without code fences, links' addresses and the marks of mathematics."""
    text = re.sub(r"```.*?```", " ", markdown, flags=re.S)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(r"\\(?:text|mathrm|mathit|textrm)\{([^}]*)\}", r"\1", text)
    text = text.replace(r"\times", "×").replace(r"\%", "%").replace("{,}", ",").replace("\u00a0", " ")
    return re.sub(r"\\[,;: ]|[$*_`~]", lambda mark: " " if mark[0].startswith("\\") or mark[0] == "~" else "", text)


def _shown(output) -> list[float]:
    if output.output_type == "stream":
        return _numbers(output.text)
    data = output.get("data", {})
    found = _numbers("".join(data.get("text/plain", "")))
    for kind in ("text/html", "text/markdown"):
        text = "".join(data.get(kind, ""))
        text = re.sub(r"<style.*?</style>|<[^>]*>", " ", text, flags=re.S)
        found += _numbers(html.unescape(text))
    return found


def _numbers(text: str) -> list[float]:
    pattern = r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[+-]?\d+)?"
    return [float(number.replace(",", "")) for number in re.findall(pattern, text)]


def _in_code(source: str) -> list[float]:
    """The numbers in code, and what its sums and powers of numbers come to; not those of comments."""
    try:
        tree = ast.parse(re.sub(r"^\s*[%!].*$", "pass", source, flags=re.M))
    except SyntaxError:
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
            found.append(float(node.value))
        elif isinstance(node, ast.BinOp) and all(isinstance(n, _ARITHMETIC) for n in ast.walk(node)):
            found.append(float(eval(compile(ast.Expression(node), "", "eval"))))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += _numbers(node.value)
    return found


_ARITHMETIC = (ast.BinOp, ast.Constant, ast.UnaryOp, ast.operator, ast.unaryop)


def _names(source: str) -> list[str]:
    return re.findall(r"(?:measured|recorded|recall)\(\s*[\"']([\w-]+)[\"']", source)


def _recorded(path: Path) -> list[float]:
    if not path.is_file():
        return []
    values = [value for row in json.loads(path.read_text())["rows"] for value in row.values()]
    found = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return found + [number for value in values if isinstance(value, str) for number in _numbers(value)]
