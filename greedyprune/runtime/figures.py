"""The style of the project's pictures: colours, marks, and legends that cover no data."""

from __future__ import annotations

import io
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which readers with any colour vision tell apart.
BLACK, BLUE, ORANGE, GREEN = "#000000", "#0072B2", "#E69F00", "#009E73"
PURPLE, SKY, VERMILLION, GREY = "#CC79A7", "#56B4E9", "#D55E00", "#666666"
# For several lines of a kind: a mark each, because in print a colour is only a shade of grey.
MARKS = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"), (SKY, "v"), (VERMILLION, "P"))

_SIZES = {1: (5.5, 3.9), 2: (4.4, 3.6), 3: (3.4, 2.9)}  # inches of a panel, for so many in a row


def panels_of(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with this many panels, at most three in a row; notebooks show it.

    ImportError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "plot needs matplotlib; install the extra: pip install '.[plot]' in the checkout"
        ) from None

    columns = 2 if count == 4 else min(3, count)
    rows = -(-count // columns)
    width, height = _SIZES[columns]
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in grid[count:]:
        unused.remove()
    setattr(figure, "_repr_png_", partial(_png, figure))  # noqa: B010  # what notebooks call
    return figure, grid[:count]


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def legend_below(figure: Figure, columns: int | None = None) -> None:
    """One legend for all panels, below them: each label once, in one row or this many columns."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        [*handles.values()], [*handles], loc="outside lower center", ncols=columns or len(handles),
        frameon=False,
    )  # fmt: skip


def legend_above(axes: Axes, **options: Any) -> None:
    """The legend of one panel, on top of its frame; for a panel without a title."""
    axes.legend(
        **{"loc": "lower left", "bbox_to_anchor": (-0.02, 1), "frameon": False, "fontsize": 9}
        | {"columnspacing": 1, "handlelength": 1.9, "labelspacing": 0.3, "borderaxespad": 0.2}
        | options
    )  # fmt: skip
