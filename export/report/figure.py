"""Draw figures as elements of the report's page, in its colours of light and dark."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PRECISIONS = {
    "fp32": "F",
    "bf16": "B",
    "fp16": "H",
    "int8": "I",
    "int8_fp8": "E",
}  # most costly first, with their letters in cells
MARKERS = dict(zip((*PRECISIONS, "other"), "oDs^vX", strict=True))
# matplotlib knows no CSS variables: it draws in these colours, which _svg replaces by what the page's theme says.
INK = {name: f"#0000{number:02x}" for number, name in enumerate(("ink", "muted", "rule", "accent", "bad", *MARKERS), 1)}
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: the reader's font, and searchable
    "svg.hashsalt": "adaattn",  # the same report gives the same file
    "text.parse_math": False,  # a $ in a name is a $
    **dict.fromkeys(("text.color", "axes.labelcolor"), INK["ink"]),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), INK["muted"]),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.axisbelow", "axes.grid"), True),
    "grid.color": INK["rule"],
    "font.size": 9,
}


def axes_of(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of a size in inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def svg_of(figure: Figure, name: str) -> Markup:
    """Return the figure as an element of the page, in the page's colours and with unique ids."""
    for axes in figure.axes:
        axes.minorticks_off()  # of logarithmic axes: they cost more time than all else
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    svg = buffer.getvalue().partition("<svg ")[2]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # would style the whole page
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for variable, colour in INK.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Markup(f'<svg role="img" aria-labelledby="{name}-caption" {svg}')
