"""Scatter plots as SVG, drawn here: they follow the page's colours, and stand alone in a file just as well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape, quoteattr

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 18, 52
COLOURS = ("#0b6e5b", "#b45f06", "#3b5bbd", "#a23b72", "#5d7f17", "#7a4fbf", "#b3261e", "#1f7a8c")
_LABEL_HEIGHT = 13


@dataclass(frozen=True, slots=True)
class Point:
    x: float
    y: float
    label: str
    group: str


def scatter(points: Sequence[Point], title: str, x_title: str, y_title: str) -> str:
    """An SVG document; "" without points. Groups have a colour each and a place in the legend."""
    points = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
    if not points:
        return ""
    groups = list(dict.fromkeys(p.group for p in points))
    legend = 18 * ((len(groups) + 2) // 3)
    height = HEIGHT + legend
    xs, ys = _axis([p.x for p in points]), _axis([p.y for p in points])

    def across(x: float) -> float:
        return LEFT + (x - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM)

    text = "var(--sy-text, #1d1f21)"
    muted, line = "var(--sy-muted, #5c5f63)", "var(--sy-line, #dedbd2)"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label={quoteattr(title)} '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{text}">',
        f"<title>{escape(title)}</title>",
    ]
    for x in xs:
        out.append(f'<line x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="{line}"/>')
        out.append(
            f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" fill="{muted}">{_number(x)}</text>'
        )
    for y in ys:
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(y):.1f}" y2="{down(y):.1f}" stroke="{line}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{down(y) + 4:.1f}" text-anchor="end" fill="{muted}">{_number(y)}</text>')
    middle = (HEIGHT - BOTTOM + TOP) / 2
    out.append(f'<text x="{(WIDTH + LEFT - RIGHT) / 2}" y="{HEIGHT - 14}" text-anchor="middle">{escape(x_title)}</text>')
    out.append(f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>')
    taken: list[tuple[float, float, float]] = []
    for point in points:
        colour = COLOURS[groups.index(point.group) % len(COLOURS)]
        x, y = across(point.x), down(point.y)
        out.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}" stroke="var(--sy-surface, #fff)" stroke-width="1.5">'
            f"<title>{escape(f'{point.label}: {point.x:g}, {point.y:g}')}</title></circle>"
        )
        out.append(_label(point.label, x, y, taken))
    for index, group in enumerate(groups):
        x, y = LEFT + (index % 3) * 190, HEIGHT + 12 + 18 * (index // 3)
        out.append(f'<circle cx="{x}" cy="{y - 4}" r="5" fill="{COLOURS[index % len(COLOURS)]}"/>')
        out.append(f'<text x="{x + 10}" y="{y}">{escape(_short(group, 26))}</text>')
    return "\n".join([*out, "</svg>", ""])


def _label(text: str, x: float, y: float, taken: list[tuple[float, float, float]]) -> str:
    """The point's name beside it, moved up or down until it lies on no other."""
    text = _short(text, 34)
    width = len(text) * 6.3
    right = x + 9 + width < WIDTH
    start = x + 9 if right else x - 9 - width
    for step in (0, 1, -1, 2, -2, 3, -3, 4, -4):
        at = y + 4 + step * _LABEL_HEIGHT
        clear = all(abs(at - b) >= _LABEL_HEIGHT or start > right_end or start + width < left for left, right_end, b in taken)
        if clear and TOP < at < HEIGHT - BOTTOM + 4:
            break
    else:
        return ""  # its name is in the point's tooltip
    taken.append((start, start + width, at))
    anchor = "start" if right else "end"
    return f'<text x="{x + (9 if right else -9):.1f}" y="{at:.1f}" text-anchor="{anchor}" font-size="11">{escape(text)}</text>'


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _axis(values: Sequence[float]) -> list[float]:
    """Round ticks that hold all values, four to seven of them."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    margin = (high - low) * 0.08
    low, high = (max(0.0, low - margin) if low >= 0 else low - margin), high + margin
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
    first = math.floor(low / step)
    return [round(step * i, 10) for i in range(first, math.ceil(high / step) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def plots(rows: Sequence[dict[str, Any]], columns: Sequence[Any]) -> dict[str, str]:
    """The standard plots of a report's table that have points: name -> SVG."""
    found = {}
    for column in columns:
        if column.key.startswith("ppl_"):
            name = column.key.removeprefix("ppl_")
            title = f"Perplexity on {name} against size"
            found[f"perplexity-{name}"] = scatter(
                _points(rows, "size_mb", column.key), title, "Checkpoint, MB", f"Perplexity, {name}"
            )
        if column.key == "decode_tok_s_1":
            points = _points(rows, "size_mb", column.key)
            found["speed"] = scatter(points, "Speed against size", "Checkpoint, MB", "Decode, tok/s")
    return {name: svg for name, svg in found.items() if svg}


def _points(rows: Sequence[dict[str, Any]], x: str, y: str) -> list[Point]:
    return [
        Point(float(row[x]), float(row[y]), _name(row), f"{row['loader'] or ''}")
        for row in rows
        if row.get(x) is not None and row.get(y) is not None
    ]


def _name(row: dict[str, Any]) -> str:
    bits = f" {row['bits']} bit" if row.get("bits") and row["method"] in ("GPTQ", "RTN") else ""
    group = f" g{row['group_size']}" if (row.get("group_size") or 0) > 0 and bits else ""
    return f"{row['method']}{bits}{group}"
