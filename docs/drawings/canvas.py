"""A drawing as an SVG: boxes, words, lines and arrows on a light card, so that it reads alike on dark pages.

Coordinates are pixels from the upper left corner. The same calls give the same bytes, so that a test can tell
whether the files beside are what the code draws.
"""

from __future__ import annotations

from xml.sax.saxutils import escape

INK, GREY, CARD = "#1f2933", "#7b8794", "#fbfbf8"
BLUE, GREEN, ORANGE, RED, VIOLET, EMPTY = (
    "#9fc5e8", "#b6d7a8", "#f9cb9c", "#ea9999", "#c9b6e4", "#ffffff"
)  # fmt: skip
"""One meaning each where drawings stand on a page: input, weights, result, what is lost or outside, what lies
between, nothing."""

_FONT = "font-family='Helvetica, Arial, sans-serif'"


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


class Canvas:
    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self._parts: list[str] = []

    def box(
        self, x: float, y: float, w: float, h: float, fill: str = EMPTY, text: str = "", *,
        edge: str = INK, size: float = 12, dashed: bool = False, thick: float = 1, opacity: float = 1,
    ) -> None:  # fmt: skip
        """A rectangle with words in its middle; `|` parts lines."""
        dash = " stroke-dasharray='4 3'" if dashed else ""
        fade = f" fill-opacity='{_number(opacity)}'" if opacity < 1 else ""
        at = f"x='{_number(x)}' y='{_number(y)}' width='{_number(w)}' height='{_number(h)}'"
        self._parts.append(
            f"<rect {at} rx='2' fill='{fill}'{fade} stroke='{edge}' stroke-width='{_number(thick)}'{dash}/>"
        )
        if text:
            self.text(x + w / 2, y + h / 2, text, size=size, middle=True)

    def cells(
        self, x: float, y: float, columns: int, rows: int, side: float, fill: str = EMPTY,
        height: float | None = None,
    ) -> None:  # fmt: skip
        """A grid of equal boxes."""
        tall = side if height is None else height
        for row in range(rows):
            for column in range(columns):
                self.box(x + column * side, y + row * tall, side, tall, fill, edge=GREY)

    def text(
        self, x: float, y: float, text: str, *, size: float = 12, middle: bool = False, end: bool = False,
        bold: bool = False, color: str = INK, code: bool = False,
    ) -> None:  # fmt: skip
        """Lines of words, their height centred on y where `middle` is, else the first line's foot at y."""
        lines = text.split("|")
        if middle:
            y += size * 0.35 - (len(lines) - 1) * size * 0.6
        anchor = "middle" if middle else "end" if end else "start"
        font = "font-family='Menlo, Consolas, monospace'" if code else _FONT
        weight = " font-weight='bold'" if bold else ""
        for number, line in enumerate(lines):
            at = f"x='{_number(x)}' y='{_number(y + number * size * 1.2)}'"
            self._parts.append(
                f"<text {at} {font} font-size='{_number(size)}' text-anchor='{anchor}' fill='{color}'"
                f"{weight}>"
                f"{escape(line)}</text>"
            )

    def line(
        self, x: float, y: float, to_x: float, to_y: float, *, color: str = INK, dashed: bool = False,
        arrow: bool = False, thick: float = 1.2,
    ) -> None:  # fmt: skip
        dash = " stroke-dasharray='4 3'" if dashed else ""
        head = " marker-end='url(#head)'" if arrow else ""
        ends = f"x1='{_number(x)}' y1='{_number(y)}' x2='{_number(to_x)}' y2='{_number(to_y)}'"
        self._parts.append(
            f"<line {ends} stroke='{color}' stroke-width='{_number(thick)}'{dash}{head}/>"
        )

    def arrow(
        self, x: float, y: float, to_x: float, to_y: float, **looks: str | float | bool
    ) -> None:
        self.line(x, y, to_x, to_y, arrow=True, **looks)  # type: ignore[arg-type]

    def path(
        self, points: list[tuple[float, float]], *, color: str = INK, arrow: bool = True
    ) -> None:
        """Lines from point to point, the last with an arrow's head."""
        for start, end in zip(points, points[1:], strict=False):
            self.line(*start, *end, color=color, arrow=arrow and end == points[-1])

    def svg(self) -> str:
        size = f"{self.width} {self.height}"
        head = (
            "<marker id='head' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' markerHeight='7' "
            f"orient='auto'><path d='M0 0L10 5L0 10z' fill='{INK}'/></marker>"
        )
        card = f"<rect width='{self.width}' height='{self.height}' rx='6' fill='{CARD}'/>"
        return "\n".join(
            [
                f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {size}' width='{self.width}' "
                f"height='{self.height}' role='img'>",
                f"<title>{escape(self.title)}</title>",
                f"<defs>{head}</defs>",
                card,
                *self._parts,
                "</svg>\n",
            ]
        )
