"""The report's frame: style sheet, and the few HTML pieces its sections are made of. Nothing here loads anything."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from html import escape as _escape

from .terminal import printable

STYLE = """
:root { color-scheme: light dark;
  --paper: #fdfdfb; --ink: #1c2326; --soft: #5b666b; --rule: #d9dedd; --panel: #f2f4f2;
  --val: #0b6e78; --train: #c2570c; --good: #1a7f4b; --bad: #b3261e;
  --note: #8a6100; --right: #0b7f86; --wrong: #cf4a12; --strong: #ffffff; }
@media screen and (prefers-color-scheme: dark) { :root {
  --paper: #14191b; --ink: #e6eae9; --soft: #9aa6a9; --rule: #323b3e; --panel: #1d2427;
  --val: #4cc3cd; --train: #f0954a; --good: #5cc98d; --bad: #ff8a80;
  --note: #e3b341; --right: #38b3bb; --wrong: #f57a3d; --strong: #10191b; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 1.15rem; font-weight: 600; margin: 0; color: var(--soft); }
h2 { font-size: 1.3rem; line-height: 1.25; margin: 56px 0 12px; padding-top: 14px; border-top: 2px solid var(--ink); }
h3 { font-size: 1rem; margin: 28px 0 8px; }
p { margin: 0 0 12px; max-width: 74ch; }
h1, h2, h3, p, li, figcaption, summary { overflow-wrap: anywhere; }
strong, code { unicode-bidi: isolate; }
code, pre { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: .86em; }
pre { background: var(--panel); padding: 14px 16px; overflow-x: auto; border-radius: 6px; line-height: 1.4; }
.soft, .note { color: var(--soft); } .note { font-size: .9rem; }
.banner { border-left: 4px solid var(--note); background: var(--panel); padding: 10px 14px; margin: 16px 0; }
.headline { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); gap: 8px 40px; align-items: center;
  margin: 10px 0 20px; }
.big { font-size: clamp(3rem, 9vw, 5rem); font-weight: 650; line-height: 1; letter-spacing: -.03em; margin: 0;
  font-variant-numeric: tabular-nums; }
.big small { font-size: .45em; font-weight: 500; letter-spacing: 0; }
.headline p { margin: 6px 0 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(145px, 1fr)); gap: 14px 20px; margin: 20px 0 0;
  padding: 14px 0 0; border-top: 1px solid var(--rule); }
.facts dt { color: var(--soft); font-size: .82rem; } .facts dd { margin: 0; overflow-wrap: anywhere; }
.verdicts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 22px 40px; margin: 0; padding: 0;
  list-style: none; }
.verdicts h3 { margin: 0 0 4px; } .verdicts p { margin: 0; font-size: .95rem; overflow-wrap: anywhere; }
.verdicts .mistakes { margin-top: 10px; }
.verdicts .answer { display: inline-block; font-weight: 650; margin-right: .35em; }
.good .answer { color: var(--good); } .bad .answer { color: var(--bad); } .open .answer { color: var(--note); }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 28px 32px; }
.charts + .note { margin-top: 16px; }
.broad { width: min(1340px, 96vw); margin-left: calc(50% - min(670px, 48vw)); }
.pair { display: grid; grid-template-columns: minmax(0, 3fr) minmax(220px, 2fr); gap: 12px 48px; align-items: start; }
.pair h3 { margin-top: 0; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: 6px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--ink); font-size: 12.5px; font-family: inherit; }
svg text { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; stroke-linejoin: round; }
svg .count, svg.legend text { stroke: none; }
svg .small { fill: var(--soft); font-size: 11.5px; } svg .name { font-weight: 650; }
svg .grid { stroke: var(--rule); stroke-width: 1; } svg .axis { stroke: var(--soft); stroke-width: 1; }
svg polyline { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
svg polyline.train { stroke: var(--train); stroke-dasharray: 6 4; } svg polyline.val { stroke: var(--val); }
svg polyline.undone { stroke-width: 1.4; opacity: .45; }
svg circle.train { fill: var(--train); } svg circle.val { fill: var(--val); }
svg .kept { fill: none; stroke: var(--ink); stroke-width: 1.8; }
svg .move { stroke: var(--ink); stroke-width: 2; stroke-dasharray: 2 4; stroke-linecap: round; }
svg .event { stroke: var(--bad); stroke-width: 1.4; } svg .eventname { fill: var(--bad); }
svg .level { stroke: var(--soft); stroke-width: 1.6; stroke-dasharray: 4 3; }
svg .interval { fill: var(--val); opacity: .32; }
svg .frozen { fill: var(--soft); opacity: .4; } svg .trained { fill: var(--train); }
svg .line { stroke: var(--ink); stroke-width: 2; }
svg .right { fill: var(--right); } svg .wrong { fill: var(--wrong); } svg .outline { fill: none; stroke: var(--soft); }
svg .count { fill: var(--ink); } svg .strong { fill: var(--strong); }
svg.bar { width: 120px; height: 14px; display: inline-block; vertical-align: middle; }
svg.strip { width: 160px; display: inline-block; vertical-align: middle; }
svg.legend { width: auto; max-width: 100%; display: inline-block; margin: 12px 24px 0 0; }
svg.key { width: 34px; height: 12px; display: inline-block; vertical-align: middle; margin-right: 6px; }
.keys { margin: 0 0 14px; max-width: none; }
.keys span { display: inline-block; max-width: 100%; overflow-wrap: anywhere; margin-right: 22px; }
.wide { overflow-x: auto; } .wide:focus-visible { outline: 2px solid var(--val); outline-offset: 4px; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; width: 100%; }
th { font-weight: 600; color: var(--soft); font-size: .82rem; text-align: left; vertical-align: bottom; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
tbody th { color: var(--ink); font-size: inherit; font-weight: 500; overflow-wrap: anywhere; min-width: 7em; }
td.n, th.n { text-align: right; } td.n { white-space: nowrap; } td .soft { font-size: .88em; }
tfoot td, tfoot th { border-bottom: 0; font-weight: 600; color: var(--ink); font-size: inherit; }
details { margin: 14px 0; } summary { cursor: pointer; color: var(--val); font-weight: 600; }
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 24px 20px; margin: 0;
  padding: 0; list-style: none; }
.mistakes img, .mistakes .gone { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--panel);
  display: block; border-radius: 4px; margin-bottom: 6px; }
.mistakes .gone { display: grid; place-items: center; text-align: center; color: var(--soft); font-size: .85rem;
  padding: 8px; }
.mistakes li { font-size: .88rem; line-height: 1.4; overflow-wrap: anywhere; min-width: 0; }
.mistakes .path { color: var(--soft); font-size: .78rem; }
footer { margin-top: 56px; color: var(--soft); font-size: .85rem; border-top: 1px solid var(--rule);
  padding-top: 12px; }
@media (max-width: 720px) {
  main { padding: 20px 16px 40px; } h2 { margin-top: 40px; }
  .headline, .verdicts, .charts, .pair { grid-template-columns: minmax(0, 1fr); }
  .facts { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .broad { width: auto; margin-left: 0; }
  svg.chart text { font-size: 15px; } svg.chart .small { font-size: 14px; }
  .mistakes { grid-template-columns: repeat(2, minmax(0, 1fr)); } th, td { padding-right: 10px; }
}
@media print {
  body { font-size: 11pt; } main { max-width: none; padding: 0; } h2 { margin-top: 24pt; break-after: avoid; }
  h3, figcaption { break-after: avoid; } figure, tr, li, .headline { break-inside: avoid; }
  table { font-size: 8.5pt; } svg.strip { width: 110px; }
  .wide { overflow: visible; } .broad { width: auto; margin-left: 0; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  details::details-content { content-visibility: visible; display: block; } details > summary { color: var(--ink); }
}
"""

# Words of Hebrew, Arabic and their neighbours with what joins them, and what stands in brackets behind them.
_R = "[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]"
_RIGHT_TO_LEFT = re.compile(rf"""{_R}(?:[\d_\u200c\u200d]|{_R}|[ .'"/&-]+(?={_R})|[ ]?\({_R}[^()]*\))*""")

NONE = "\u2013"  # a dash where there is no figure
_COMMAND = re.compile(r"`(headstart [^`]*)`")


def esc(text: object) -> str:
    """Text made safe for HTML; bytes of a file name that are no valid Unicode become replacement signs."""
    return _escape(str(text).encode("utf-8", "replace").decode(), quote=True)


def sentence(text: object) -> str:
    """Words of ours with names in them, made safe for HTML; commands stand as code, which backticks mark in a terminal.

    Names that run from right to left stand for themselves, or they would draw the figures beside them to their other
    side.
    """
    text, parts, at = printable(str(text)), [], 0
    for name in _RIGHT_TO_LEFT.finditer(text):
        parts += [esc(text[at : name.start()]), f"<bdi>{esc(name[0])}</bdi>"]
        at = name.end()
    return _COMMAND.sub(r"<code>\1</code>", "".join([*parts, esc(text[at:])]))


def long_path(text: object) -> str:
    """A path that breaks after its slashes and before its ending where it does not fit, made safe for HTML."""
    return re.sub(r"(?<=[/\\])|(?=\.\w+$)", "<wbr>", esc(text))


def percent(share: float, digits: int = 1) -> str:
    """`93.5 %`, held together by a no-break space."""
    return f"{100 * share:.{digits}f}\u00a0%"


def span(interval: Sequence[float]) -> str:
    """`89.2 to 96.2 %`."""
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}\u00a0%"


def number(value: float | None, digits: int = 3) -> str:
    """A decimal, or a dash where there is none."""
    return NONE if value is None else f"{value:.{digits}f}"


def duration(seconds: float | None) -> str:
    """`4.2 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds is None:
        return NONE
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    label: str,
    numbers: Sequence[int] = (),
    foot: Sequence[str] | None = None,
) -> str:
    """A table of ready HTML cells; the first cell of a row heads it. `numbers`: columns that are set flush right."""

    def cells(row: Sequence[str], first: str, rest: str, scope: str) -> str:
        out = []
        for i, cell in enumerate(row):
            tag = first if i == 0 else rest
            align = ' class="n"' if i in numbers else ""
            out.append(f"<{tag}{align}{f' scope={chr(34)}{scope}{chr(34)}' if tag == 'th' else ''}>{cell}</{tag}>")
        return f"<tr>{''.join(out)}</tr>"

    head = cells(header, "th", "th", "col")
    body = "".join(cells(row, "th", "td", "row") for row in rows)
    tail = f"<tfoot>{cells(foot, 'th', 'td', 'row')}</tfoot>" if foot else ""
    return wide(f"<table><thead>{head}</thead><tbody>{body}</tbody>{tail}</table>", label=label)


def wide(content: str, *, label: str) -> str:
    """Content that may be wider than a phone: it scrolls sideways by itself, by finger and by keyboard."""
    return f'<div class="wide" role="region" aria-label="{esc(label)}" tabindex="0">{content}</div>'


def details(summary: str, content: str) -> str:
    """A part that opens on a click, without a script; printed open."""
    return f"<details><summary>{summary}</summary>{content}</details>"


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Small named facts, as a definition list of ready HTML values."""
    return f'<dl class="facts">{"".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in pairs)}</dl>'


def section(title: str, *content: str) -> str:
    """A section under its heading; empty when there is nothing in it."""
    body = "".join(content)
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def page_policy(script: str = "") -> str:
    """The content security policy of a page: nothing is loaded from outside, and no script runs but this one."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    return policy


def page(title: str, content: str, *, style: str = "", script: str = "", policy: str = "") -> str:
    """The whole document.

    Args:
        style: rules after those of every page.
        script: JavaScript that runs at the end of the page; the policy knows it by its hash.
        policy: in place of `page_policy(script)`.
    """
    policy = policy or page_policy(script)
    tail = f"\n<script>{script}</script>" if script else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{esc(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n"
        f"<body>\n<main>\n{content}\n</main>{tail}\n</body>\n</html>\n"
    )
