"""A matplotlib figure as an SVG element that can stand inside a page."""

import io
import re
from typing import TYPE_CHECKING

from neural_layers.distill.report.style import PALETTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def inline_svg(figure: "Figure", name: str) -> str:
    """The figure as one `<svg>` element that takes the width it is given and the colours of the page.

    figure: drawn in the light colours of `PALETTE`
    name:   a prefix for every id, because several figures share one page
    """
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Text becomes outlines: the reader's fonts have other widths, and labels would run into each other.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": name, "text.usetex": False}):
        figure.savefig(buffer, format="svg", metadata=nothing, facecolor="none", edgecolor="none")
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    svg = re.sub(r"<svg[^>]*>", f'<svg {view[0]} aria-hidden="true">', svg, count=1)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    for colour, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{colour})")
    return svg
