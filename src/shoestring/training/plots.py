"""Curves of a run's metrics as PNG (matplotlib, which is only imported here)."""

from pathlib import Path
from typing import Any

from shoestring.errors import MissingDependencyError
from shoestring.training.folder import RunFolder

__all__ = ["new_figure", "plot_run"]

_NOT_METRICS = {"kind", "step", "seconds"}


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    """A figure (inches) and its axes, drawn without a display.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib: pip install 'shoestring[train]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def plot_run(folder: RunFolder) -> list[Path]:
    """Draw every metric over steps into `plots/`; return the files. Without matplotlib nothing is drawn."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in folder.metrics():
        for name, value in row.items():
            if name not in _NOT_METRICS and isinstance(value, int | float):
                label = name if row["kind"] == "train" else f"{row['kind']}_{name}"
                curves.setdefault(label, []).append((row["step"], value))
    files = []
    for name, points in curves.items():
        try:
            figure, axes = new_figure(6, 4)
        except MissingDependencyError:
            return []
        steps, values = zip(*points, strict=True)
        axes[0, 0].plot(steps, values, marker="." if len(points) < 40 else "")
        axes[0, 0].set_xlabel("step")
        axes[0, 0].set_ylabel(name.replace("_", " "))
        axes[0, 0].grid(alpha=0.3)
        path = folder.path / "plots" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=110)
        files.append(path)
    return files
