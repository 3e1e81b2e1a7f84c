"""Can a picture be read? Looks for legends and titles that lie on lines or on other texts."""

import itertools

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox


def covered(figure: Figure) -> list[str]:
    """What lies on something else or goes over the edge, in words; empty for a good picture."""
    FigureCanvasAgg(figure).draw()  # lays the figure out
    legends = [*figure.legends, *(legend for a in figure.axes if (legend := a.get_legend()))]
    problems = [
        f"a legend on the line {line.get_label()!r}"
        for legend in legends for axes in figure.axes for line in axes.get_lines()
        if crosses(axes, line, legend.get_window_extent())
    ]  # fmt: skip
    boxes = {f"legend {i}": legend.get_window_extent() for i, legend in enumerate(legends)}
    for legend in legends:
        legend.set_in_layout(False)  # a panel's box is to be without its legend
    boxes |= {f"panel {i}": axes.get_tightbbox() for i, axes in enumerate(figure.axes)}
    if figure.get_suptitle():
        boxes["the title"] = figure._suptitle.get_window_extent()
    problems += [
        f"{a} on {b}" for (a, first), (b, second) in itertools.combinations(boxes.items(), 2)
        if Bbox.intersection(first.padded(-1), second.padded(-1)) is not None
    ]  # fmt: skip
    page = figure.bbox.padded(1)
    return problems + [
        f"{name} over the edge" for name, box in boxes.items()
        if (Bbox.union([page, box]).size > page.size).any()
    ]  # fmt: skip


def crosses(axes: Axes, line: Line2D, box: Bbox) -> bool:
    """Does what is seen of a line go through the box?"""
    seen = Bbox.intersection(axes.get_window_extent(), box)
    path = line.get_transform().transform_path(line.get_path())
    return seen is not None and len(path) > 0 and bool(path.intersects_bbox(seen, filled=False))


def looks(axes: Axes) -> list[tuple[str, str]]:
    """Dash and mark of each line: what tells them apart in print, where colours are greys."""
    return [(line.get_linestyle(), str(line.get_marker())) for line in axes.get_lines()]
