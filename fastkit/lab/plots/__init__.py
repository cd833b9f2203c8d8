"""Pictures of what the lab reports: each function takes a report and returns a matplotlib figure.

    from fastkit.lab import plots
    plots.lanes_and_sectors(trace(...).accesses[0])

A figure shows itself where it ends a notebook's cell and is saved by `.savefig`; nothing is kept in pyplot. What a
report does not know is shown as "unknown". Where a number was measured, the caller says on which card (`source`), as
`fastkit.lab.results.caption` does for recorded ones. `fastkit.lab.widgets.explore` adds sliders.
"""

from fastkit.lab.plots.memory import bank_map, lanes_and_sectors
from fastkit.lab.plots.speeds import Point, compare, ladder, point, roofline
from fastkit.lab.plots.tiles import layout_map, tile_walk
from fastkit.lab.plots.times import Slot, pipeline, schedule, throttling

__all__ = [
    "Point",
    "Slot",
    "bank_map",
    "compare",
    "ladder",
    "lanes_and_sectors",
    "layout_map",
    "pipeline",
    "point",
    "roofline",
    "schedule",
    "throttling",
    "tile_walk",
]
