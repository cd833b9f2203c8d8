"""Pictures with sliders, for notebooks; where widgets do not run, the picture alone."""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from fastkit.errors import FastkitError
from fastkit.lab.bank_conflicts import SharedAccess
from fastkit.lab.plots import bank_map
from fastkit.lab.plots.paper import Picture, unknown
from fastkit.lab.tracer import Trace

HINT = "Run this cell in Jupyter to move the controls."


def explore(picture: Callable[..., Picture], report: Any = None, **named):
    """`picture(report, **named)` with a control for what can be chosen.

        explore(lanes_and_sectors, trace)                               # which access
        explore(bank_map, {"plain": before, "swizzled": after})
        explore(tile_walk, trace, shape=(256, 256), step=range(16))
        explore(pipeline, load=range(100, 900, 50), compute=200.0, stages=[1, 2, 3, 4])

    picture  a function of fastkit.lab.plots
    report   its report; a Trace stands for its accesses; a dict or a list of reports makes a dropdown
    named    arguments of the picture: a range makes a slider, a list or dict a dropdown, anything else is passed on

    A slider stands in the middle at first, a dropdown at the top. Returns the picture of that where no widgets run (no
    ipywidgets, no Jupyter kernel). Else an Explorer, which a cell shows as that same picture, an ordinary output that
    saved notebooks keep, with controls under it. Raises FastkitError where there is nothing to choose from.
    """
    choices = {} if report is None else {"report": _reports(picture, report)}
    choices |= {name: _values(value) for name, value in named.items()}
    if empty := [name for name, values in choices.items() if not values]:
        raise FastkitError(f"there is nothing to choose from for {', '.join(empty)}")
    explorer = Explorer(picture, choices, {name for name, value in named.items() if isinstance(value, range)})
    return explorer if _widgets_run() and explorer.controls else explorer.picture()


class Explorer:
    """A picture and its controls; `controls` maps an argument of the picture, or "report", to its widget."""

    def __init__(self, draw: Callable[..., Picture], choices: dict[str, dict[str, Any]], sliders: set[str]):
        self.draw, self.choices = draw, choices
        self.shown = None
        self.chosen = {
            name: list(values)[len(values) // 2 if name in sliders else 0] for name, values in choices.items()
        }
        self.controls = {}
        if _installed("ipywidgets"):
            for name, values in choices.items():
                if len(values) > 1:
                    self.controls[name] = _control(name, list(values), self.chosen[name], name in sliders)
                    self.controls[name].observe(self._choose, names="value")

    def picture(self) -> Picture:
        """The picture of what is chosen now. A choice that makes none, such as a step that there is not, says why."""
        chosen = {name: values[self.chosen[name]] for name, values in self.choices.items()}
        report = [chosen.pop("report")] if "report" in chosen else []
        try:
            return self.draw(*report, **chosen)
        except FastkitError as error:
            if not self.controls:
                raise
            return unknown("This choice", str(error))

    def _choose(self, _change) -> None:
        self.chosen |= {name: control.value for name, control in self.controls.items()}
        if self.shown:
            self.shown.update(self.picture())

    def _ipython_display_(self) -> None:
        from IPython.display import display
        from ipywidgets import HBox

        self.shown = display(self.picture(), display_id=True)
        row = HBox(list(self.controls.values()), layout={"flex_flow": "row wrap"})
        display(row._repr_mimebundle_() | {"text/plain": HINT}, raw=True)


def _reports(picture, report) -> dict[str, Any]:
    """Reports by what to call them."""
    if isinstance(report, Trace):
        report = list(report.shared if picture is bank_map else report.accesses)
    if isinstance(report, Mapping):
        return {str(name): value for name, value in report.items()}
    if not isinstance(report, list | tuple):
        return {"": report}
    named = {}
    for number, one in enumerate(report):
        argument = one.operation if isinstance(one, SharedAccess) else getattr(one, "argument", "")
        words = f"{one.kind} {argument}, line {one.line}" if hasattr(one, "kind") else str(number)
        named[f"{words} ({number})" if words in named else words] = one
    return named


def _values(value) -> dict[Any, Any]:
    """Choices by what to call them; a single one if `value` is no range, list or dict."""
    if isinstance(value, range | list):
        return {one if isinstance(value, range) else str(one): one for one in value}
    return {str(name): one for name, one in value.items()} if isinstance(value, Mapping) else {"": value}


def _control(name: str, options: list, value, slider: bool):
    import ipywidgets

    named = dict(options=options, value=value, description=name.replace("_", " "))
    if slider:
        return ipywidgets.SelectionSlider(**named, continuous_update=False, layout={"width": "420px"})
    return ipywidgets.Dropdown(**named, layout={"width": "max-content"})


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _widgets_run() -> bool:
    """Whether this is a Jupyter kernel with ipywidgets."""
    if not (_installed("ipywidgets") and _installed("IPython")):
        return False
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel")
