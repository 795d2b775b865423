"""Figures of comparisons, with matplotlib, which is imported only here and only when a figure is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

FLOOR = 1e-16
"""Relative errors below this are drawn here: they are rounding."""


def cost_and_error(rows: Sequence[Any], reference: str, axes: Any = None) -> Any:
    """Relative error of each row against its cost in inner gradients (left) and its temporary memory (right).

    Args:
      rows: of a `Comparison`; the reference itself is drawn as an open circle at the bottom.
      reference: its name.
      axes: two matplotlib axes; made if None.

    Returns:
      The axes.

    Raises:
      ModuleNotFoundError: without matplotlib; says how to install it.
    """
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "matplotlib is not installed, which Comparison.plot needs: pip install 'bilevel[lora]'."
        ) from error

    if axes is None:
        _, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for axis, label, cost in zip(
        axes,
        ("cost, inner gradients", "temporary memory, MB"),
        (lambda row: row.gradients, lambda row: row.temporary / 1e6),
        strict=True,
    ):
        for i, row in enumerate(rows):
            colour, error = f"C{i % 10}", max(row.relative_error, FLOOR)
            face = "none" if row.name == reference else colour
            axis.scatter(cost(row), error, s=45, edgecolors=colour, facecolors=face)
            axis.annotate(row.name, (cost(row), error), xytext=(5, 4), textcoords="offset points", fontsize=8)
        axis.set(xlabel=label, xscale="log", yscale="log")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(0.2)
    axes[0].set_ylabel(f"relative error, against {reference}")
    return axes
