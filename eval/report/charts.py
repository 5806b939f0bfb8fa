"""Charts as SVG text for the page: colours and fonts are classes that its style sheet defines for light and dark.

Every function returns one `<svg>` 440 units wide, so that its text stays readable when a phone shrinks it. Whatever
comes from files is escaped here. Marks carry a `<title>`, which browsers show on hover and screen readers read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

WIDTH = 440
HEAT_STEPS = 7  # classes h0 ... h6 of the style sheet
_LETTER = 6.0  # width of a letter at the labels' size, roughly


class Point(NamedTuple):
    """One mark of a scatter plot; `series` is the number of its colour."""

    x: float
    y: float
    label: str
    series: int


class Axis(NamedTuple):
    """Where numbers lie between the pixels `start` and `end`, and the marks to write."""

    low: float
    high: float
    log: bool
    start: float
    end: float
    ticks: list[float]

    def at(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)


def scatter(
    points: Sequence[Point],
    x_title: str,
    y_title: str,
    line: tuple[float, str] | None = None,
    series: Mapping[int, str] | None = None,
) -> Markup:
    """Points with their labels beside them, and a dashed level `line` (y, its label); y is logarithmic when it spans a
    factor of six. `series` names colours for a legend."""
    left, right, top, bottom = 46, WIDTH - 14, 30, 270
    ys = [point.y for point in points] + ([] if line is None else [line[0]])
    x = _axis([0.0, *(point.x for point in points)], left, right, False)
    y = _axis(ys, bottom, top, min(ys) > 0 and max(ys) > 6 * min(ys))
    parts = [_grid(x, y, left, right, top, bottom), _titles(x_title, y_title, right, bottom)]
    if line is not None:
        at = y.at(line[0])
        parts.append(
            Markup('<line class="level" x1="{}" y1="{:.1f}" x2="{}" y2="{:.1f}"/>').format(left, at, right, at)
        )
        parts.append(_text(left + 6, at - 5, line[1], "note"))
    if series is not None:
        parts.append(_legend(series))
    # What labels must not cover, as left, right and baseline: the marks, then each other.
    taken = [(x.at(point.x) - 6, x.at(point.x) + 6, y.at(point.y) + 4) for point in points]
    for point in sorted(points, key=lambda point: -point.y):
        px, py = x.at(point.x), y.at(point.y)
        shape = Markup('<circle class="mark s{}" cx="{:.1f}" cy="{:.1f}" r="5"><title>{}</title></circle>')
        parts.append(shape.format(point.series, px, py, f"{point.label}: {point.x:.2f} bits, {point.y:.2f}"))
        width = _LETTER * len(point.label)
        begin = px + 9 if px + 9 + width < right else px - 9 - width
        base = py + 4
        while any(begin < b and a < begin + width and abs(base - at) < 12 for a, b, at in taken):
            base += 3
        taken.append((begin, begin + width, base))
        parts.append(_text(begin, base, point.label, "label"))
    deepest = max([bottom + 34.0, *(base + 8 for _, _, base in taken)])
    return _svg(deepest, parts, f"{y_title} against {x_title}")


def heat_map(
    rows: Sequence[str], columns: int, cells: Mapping[tuple[int, int], float], what: str, log: bool = False
) -> Markup:
    """A cell per (row, column), coloured by value, with the range underneath; a missing cell stays empty."""
    left, top, size = 92, 8, 24
    step = (WIDTH - 6 - left) / columns
    low, high = min(cells.values()), max(cells.values())
    floor = max(low, high * 1e-6, 1e-12) if log else low
    axis = Axis(floor, high, log, 0, HEAT_STEPS - 0.01, [])
    gap = 1 if step < 6 else 2
    parts = []
    for row, name in enumerate(rows):
        parts.append(_text(left - 8, top + row * size + 16, name, "label", "end"))
    cell = Markup('<rect class="h{}" x="{:.1f}" y="{}" width="{:.1f}" height="{}" rx="1.5"><title>{}</title></rect>')
    for (row, column), value in cells.items():
        heat = min(HEAT_STEPS - 1, max(0, int(axis.at(max(value, floor))))) if high > low else HEAT_STEPS // 2
        title = f"{rows[row]}, block {column}: {what} {value:.4g}"
        parts.append(
            cell.format(heat, left + column * step, top + row * size, max(1.0, step - gap), size - 2, title),
        )
    bottom = top + len(rows) * size
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100) if columns / n <= 12)
    for column in range(0, columns, every):
        parts.append(_text(left + (column + 0.5) * step, bottom + 13, str(column), "tick", "middle"))
    parts.append(_text(left - 8, bottom + 13, "block", "tick", "end"))
    swatch = Markup('<rect class="h{}" x="{}" y="{}" width="18" height="9"/>')
    parts += [swatch.format(i, left + i * 18, bottom + 26) for i in range(HEAT_STEPS)]
    end = left + HEAT_STEPS * 18
    parts.append(_text(left - 8, bottom + 35, f"{floor:.3g}", "tick", "end"))
    parts.append(_text(end + 8, bottom + 35, f"{high:.3g}{' (log scale)' if log else ''}", "tick"))
    return _svg(bottom + 46, parts, f"{what} by layer")


def bars(groups: Sequence[str], series: Sequence[str], values: Mapping[tuple[int, int], float], unit: str) -> Markup:
    """Bars of every series side by side in each group, from zero, with their values on top; `values` by (group,
    series)."""
    left, right, top, bottom = 46, WIDTH - 8, 34, 240
    y = _axis([0.0, *values.values()], bottom, top, False)
    parts = [
        _legend(dict(enumerate(series))),
        _grid(None, y, left, right, top, bottom),
        _titles("", unit, right, bottom),
    ]
    room = (right - left) / max(1, len(groups))
    width = min(46.0, (room - 16) / len(series))
    bar = Markup('<path class="mark s{}" d="{}"><title>{}</title></path>')
    for group, name in enumerate(groups):
        middle = left + (group + 0.5) * room
        parts.append(_text(middle, bottom + 16, name, "label", "middle"))
        for number, title in enumerate(series):
            if (group, number) not in values:
                continue
            value = values[group, number]
            x = middle + (number - len(series) / 2) * width + 1
            parts.append(
                bar.format(number, _rounded(x, y.at(value), width - 2, bottom), f"{title}, {name}: {value:.4g}")
            )
            parts.append(_text(x + width / 2 - 1, y.at(value) - 4, _short(value), "tick", "middle"))
    return _svg(bottom + 26, parts, unit)


def profile(values: Mapping[str, Sequence[float]], x_title: str, y_title: str, from_zero: bool = True) -> Markup:
    """A line per series over 0, 1, 2, ...; None of them needs the same length."""
    left, right, top, bottom = 46, WIDTH - 14, 34, 200
    numbers = [value for series in values.values() for value in series]
    y = _axis([*([0.0] if from_zero else []), *numbers], bottom, top, False)
    longest = max(len(series) for series in values.values())
    x = Axis(0, max(1, longest - 1), False, left + 6, right - 6, _whole_ticks(longest))
    parts = [_grid(x, y, left, right, top, bottom), _titles(x_title, y_title, right, bottom)]
    if len(values) > 1:
        parts.append(_legend(dict(enumerate(values))))
    for number, (name, series) in enumerate(values.items()):
        path = " ".join(f"{x.at(i):.1f},{y.at(value):.1f}" for i, value in enumerate(series))
        parts.append(Markup('<polyline class="line s{}" points="{}"/>').format(number, path))
        dot = Markup('<circle class="mark s{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>')
        radius = 3 if longest <= 40 else 1.5
        for i, value in enumerate(series):
            parts.append(dot.format(number, x.at(i), y.at(value), radius, f"{name}, {x_title} {i}: {value:.4g}"))
    return _svg(bottom + 34, parts, f"{y_title} by {x_title}")


# --- parts ---


def _svg(height: float, parts: Sequence[Markup], label: str) -> Markup:
    head = Markup('<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">').format(WIDTH, height, label)
    return head + Markup("").join(parts) + Markup("</svg>")


def _text(x: float, y: float, content: str, kind: str, anchor: str = "start") -> Markup:
    text = Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    return text.format(kind, x, y, anchor, escape(content))


def _grid(x: Axis | None, y: Axis, left: float, right: float, top: float, bottom: float) -> Markup:
    line = Markup('<line class="grid" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
    parts = []
    for tick in y.ticks:
        parts += [
            line.format(left, y.at(tick), right, y.at(tick)),
            _text(left - 6, y.at(tick) + 4, _short(tick), "tick", "end"),
        ]
    if x is not None:
        parts += [_text(x.at(tick), bottom + 15, _short(tick), "tick", "middle") for tick in x.ticks]
    base = Markup('<line class="axis" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
    return Markup("").join([*parts, base.format(left, bottom, right, bottom)])


def _titles(x_title: str, y_title: str, right: float, bottom: float) -> Markup:
    return _text(4, 13, y_title, "title") + (_text(right, bottom + 30, x_title, "title", "end") if x_title else "")


def _legend(series: Mapping[int, str]) -> Markup:
    """Colour keys at the top right: number of the colour -> name."""
    parts, x = [], WIDTH - 8 - sum(28 + _LETTER * len(name) for name in series.values())
    key = Markup('<rect class="mark s{}" x="{:.1f}" y="5" width="10" height="10" rx="2"/>')
    for number, name in series.items():
        parts += [key.format(number, x), _text(x + 14, 14, name, "label")]
        x += 28 + _LETTER * len(name)
    return Markup("").join(parts)


def _rounded(x: float, y: float, width: float, bottom: float) -> str:
    """A bar's outline with its two upper corners rounded."""
    r = min(3.0, max(0.0, bottom - y), width / 2)
    return (
        f"M{x:.1f},{bottom} V{y + r:.1f} Q{x:.1f},{y:.1f} {x + r:.1f},{y:.1f} H{x + width - r:.1f}"
        f" Q{x + width:.1f},{y:.1f} {x + width:.1f},{y + r:.1f} V{bottom} Z"
    )


def _axis(values: Sequence[float], start: float, end: float, log: bool) -> Axis:
    """An axis that holds `values`, with three to seven round ticks."""
    low, high = min(values), max(values)
    if log:
        low, high = low / 1.15, high * 1.15
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**exponent for exponent in exponents for step in (1, 2, 5)]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) > 7:
            inside = [tick for tick in inside if math.isclose(math.log10(tick), round(math.log10(tick)))]
        return Axis(low, high, True, start, end, inside)
    if high == low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / 4
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
    low = math.floor(low / step + 1e-9) * step
    high = math.ceil(high / step - 1e-9) * step
    count = round((high - low) / step)
    return Axis(low, high, False, start, end, [low + step * i for i in range(count + 1)])


def _whole_ticks(count: int) -> list[float]:
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000, 10**6) if count / n <= 10)
    return [float(value) for value in range(0, count, every)]


def _short(value: float) -> str:
    """A number in few letters: 1200 -> 1.2k, 0.5 -> 0.5."""
    if abs(value) >= 10_000:
        return f"{value / 1000:.0f}k"
    if abs(value) >= 1000:
        return f"{value / 1000:.3g}k"
    return f"{value:.3g}"
