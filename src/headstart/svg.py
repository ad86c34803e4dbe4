"""The few pieces that drawings in a page are made of: SVG elements as text, and round numbers for their axes."""

from __future__ import annotations

import math
from html import escape
from typing import Any


def nice_ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """About `count` round numbers (steps of 1, 2, 2.5 or 5 times a power of ten) inside [low, high]."""
    span = max(high - low, 1e-12)
    power = 10 ** math.floor(math.log10(span / count))
    steps = [s * power for s in (1, 2, 2.5, 5, 10, 20) if not whole or ((s * power) % 1 == 0 and s * power >= 1)]
    step = next((s for s in steps if span / s <= count + 0.5), steps[-1] if steps else 1.0)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tag(name: str, content: str = "", **attributes: Any) -> str:
    """One SVG element; `class_` and `text_anchor` stand for `class` and `text-anchor`, numbers get two decimals."""
    parts = []
    for key, value in attributes.items():
        text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else escape(str(value))
        parts.append(f' {key.rstrip("_").replace("_", "-")}="{text}"')
    return f"<{name}{''.join(parts)}>{content}</{name}>" if content else f"<{name}{''.join(parts)}/>"


def text(x: float, y: float, words: str, **attributes: Any) -> str:
    """Words at a place; their special characters are escaped."""
    return tag("text", escape(words), x=x, y=y, **attributes)


def svg(width: float, height: float, content: str, title: str, *, class_: str = "chart") -> str:
    """The outer element: scales with the page, and says in words what it shows."""
    return (
        f'<svg class="{class_}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}" '
        f'style="max-width:{width * 1.25:.0f}px">{content}</svg>'
    )
