"""Inline SVG charts for the report: numbers in, markup out; colours are the page's classes c0, c1, ..."""

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 170, 44, 8, 8, 22
COLOURS = 7
BINS = 24

Points = Sequence[tuple[float, float]]


def colour(series: int) -> str:
    """Return the class of a series; the first one, the base, is grey."""
    return f"c{series if series < COLOURS else 1 + (series - 1) % (COLOURS - 1)}"


def figure(height: float, alt: str, parts: Sequence[Markup]) -> Markup:
    """Return an SVG with its description for those who can't see it."""
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, alt, Markup("").join(parts)
    )


def text(x: float, y: float, words: str, anchor: str = "start") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, words)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>').format(x1, y1, x2, y2, kind)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round numbers from ``low`` to ``high``, at most about ``count``."""
    raw = (high - low) / count
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first, last = int(np.ceil(low / step)), int(np.floor(high / step))
    return [float(step * place) for place in range(first, last + 1)]


def span(values: Sequence[float]) -> tuple[float, float]:
    """Return the range of finite ``values``, never empty."""
    finite = [value for value in values if np.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    pad = (high - low) * 0.05 or max(abs(high), 1.0) * 0.1
    return low - pad, high + pad


def curves(series: Mapping[int, Points], alt: str) -> Markup:
    """Return lines over training steps, one per iteration."""
    points = [point for some in series.values() for point in some]
    (left, right), (low, high) = ((min(x for x, _ in points), max(x for x, _ in points)), span([y for _, y in points]))
    wide = (right - left) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - left) / wide * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM),
        )

    parts = []
    for value in ticks(low, high):
        _, y = place(left, value)
        parts += [line(LEFT, y, WIDTH - RIGHT, y, "grid"), text(LEFT - 5, y + 4, f"{value:g}", "end")]
    parts += [text(LEFT, HEIGHT - 6, f"step {left:g}"), text(WIDTH - RIGHT, HEIGHT - 6, f"{right:g}", "end")]
    for iteration, some in series.items():
        placed = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in some if np.isfinite(y))
        parts.append(Markup('<polyline class="line {}" points="{}"/>').format(colour(iteration), placed))
    return figure(HEIGHT, alt, parts)


def distributions(series: Mapping[int, np.ndarray], names: Mapping[int, str], alt: str) -> Markup:
    """Return a histogram per model below one another on one scale, its mean as a stroke."""
    low, high = span([float(value) for values in series.values() for value in values])
    row, gap, wide = 38.0, 18, WIDTH - 2 * RIGHT
    edges = np.linspace(low, high, BINS + 1)
    counts = {k: np.histogram(values, edges)[0] / len(values) for k, values in series.items()}
    tallest = max(float(count.max()) for count in counts.values()) or 1.0
    parts = []
    for place, (k, count) in enumerate(counts.items()):
        bottom = (place + 1) * (row + gap)
        for bin, share in enumerate(count):
            if share:
                tall = row * float(share) / tallest
                parts.append(
                    Markup('<rect class="bar {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                        colour(k), RIGHT + bin * wide / BINS, bottom - tall, wide / BINS - 1, tall
                    )
                )
        mean = float(series[k].mean())
        at = RIGHT + (mean - low) / (high - low) * wide
        parts += [
            line(RIGHT, bottom, WIDTH - RIGHT, bottom, "grid"),
            line(at, bottom - row, at, bottom, "mean"),
            text(RIGHT, bottom - row - 3, f"{names[k]}, mean {mean:.3g}"),
        ]
    end = len(series) * (row + gap)
    for value in ticks(low, high, 8):
        parts.append(text(RIGHT + (value - low) / (high - low) * wide, end + 14, f"{value:g}", "middle"))
    return figure(end + 20, alt, parts)


def bars(rows: Sequence[tuple[str, int, Mapping[str, float]]], alt: str) -> Markup:
    """Return a bar per row (name, series, share with its interval) from 0 to 1, a dashed line at one half."""
    row, wide = 40.0, WIDTH - 2 * RIGHT
    middle = RIGHT + wide / 2
    parts = []
    for place, (name, series, share) in enumerate(rows):
        top = place * row + 16
        value, low, high = (RIGHT + share[key] * wide for key in ("value", "low", "high"))
        parts += [
            text(RIGHT, top - 4, f"{name}: {share['value']:.2f} [{share['low']:.2f}, {share['high']:.2f}]"),
            Markup('<rect class="bar {}" x="{}" y="{:.1f}" width="{:.1f}" height="14"/>').format(
                colour(series), RIGHT, top, value - RIGHT
            ),
            line(middle, top - 1, middle, top + 15, "half"),
            line(low, top + 7, high, top + 7, "mean"),
            line(low, top + 3, low, top + 11, "mean"),
            line(high, top + 3, high, top + 11, "mean"),
        ]
    end = len(rows) * row
    for words, at, anchor in (("0", RIGHT, "start"), ("0.5: a draw", middle, "middle"), ("1", WIDTH - RIGHT, "end")):
        parts.append(text(at, end + 14, words, anchor))
    return figure(end + 20, alt, parts)
