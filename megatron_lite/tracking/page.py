"""The frame of report.html: its document and its style. Readable on a phone, light or dark, and on paper."""

from __future__ import annotations

from html import escape

from megatron_lite.tracking.plot import COLORS, FAINT, GRID, INK

# CSS variable -> color. The charts are drawn in the light ones; `chart` turns these into variables.
_LIGHT = {"ink": INK, "quiet": FAINT, "line": GRID, **{f"s{i}": color for i, color in enumerate(COLORS)}}
_DARK = {
    "ink": "#f0f0ec", "quiet": "#a3a39b", "line": "#33332f", "s0": "#3987e5", "s1": "#d95926", "s2": "#199e70", "s3": "#c98500",
    "s4": "#d55181", "s5": "#2fa52f", "s6": "#9085e9", "s7": "#e66767",
}  # fmt: skip
_BORDERS = ("solid", "dashed", "dotted", "double")

_STYLE = """
:root { color-scheme: light dark; --page:#f7f7f5; --card:#ffffff; --good:#0a7a0a; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --page:#141413; --card:#1d1d1c; --good:#4cc38a; DARK } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 940px; padding: 28px 20px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 12px; }
h3 { font-size: 14px; margin: 20px 0 8px; }
p { margin: 0 0 4px; overflow-wrap: anywhere; }
header { margin-bottom: 20px; }
.quiet { color: var(--quiet); font-size: 13px; }
.state { display: inline-block; padding: 1px 10px; margin-right: 6px; border-radius: 99px; font-weight: 600; font-size: 13px;
  border: 1px solid currentColor; }
.finished { color: var(--good); } .running { color: var(--s0); } .preempted { color: var(--s1); } .failed { color: var(--s7); }
.unknown { color: var(--quiet); }
section, .tiles > div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
section { padding: 18px 20px; margin-bottom: 16px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 12px; margin: 0 0 16px; }
.tiles > div { padding: 12px 16px; }
dt { color: var(--quiet); font-size: 13px; } dd { margin: 0; font-size: 21px; font-weight: 600; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 16px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-family: inherit !important; font-variant-numeric: tabular-nums; }
.key { display: inline-block; width: 22px; margin-right: 8px; vertical-align: middle; border-top: 3px solid; }
.bar { position: relative; width: 130px; height: 10px; margin-left: auto; background: var(--line); border-radius: 2px; }
.bar i { display: block; height: 100%; background: var(--s0); border-radius: 2px; }
.bar b { position: absolute; top: 0; width: 2px; height: 100%; background: var(--ink); }
.scroll { overflow-x: auto; margin-top: 12px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { color: var(--quiet); font-weight: 500; font-size: 13px; }
th, td { text-align: right; padding: 5px 0 5px 18px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; max-width: 240px; overflow: hidden; text-overflow: ellipsis; }
tbody tr:last-child td { border-bottom: 0; }
summary { cursor: pointer; } summary h2 { display: inline; }
pre { overflow-x: auto; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; margin: 14px 0 0; }
@media (max-width: 640px) {
  body { padding: 18px 12px 40px; } section { padding: 14px; }
  .pair { grid-template-columns: 1fr; } .tiles { grid-template-columns: 1fr 1fr; gap: 8px; } .tiles > div { padding: 10px 12px; }
  dd { font-size: 18px; } section > svg text { font-size: 15px !important; } .pair svg text { font-size: 10px !important; }
  table { font-size: 13px; } th { font-size: 12px; } th, td { padding-left: 9px; }
  .key { width: 16px; margin-right: 5px; } td:first-child { max-width: 40vw; }
}
@media print { body { background: none; max-width: none; } section { break-inside: avoid; } }
"""


def page(title: str, body: str) -> str:
    """A whole HTML document; `title` is text, `body` is HTML."""
    style = _STYLE.replace("LIGHT", _variables(_LIGHT)).replace("DARK", _variables(_DARK))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def chart(svg: str) -> str:
    """A drawing of `plot` in the page's colors, which differ between light and dark."""
    for name, color in _LIGHT.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg


def key(i: int | None) -> str:
    """The sample of a curve in front of its name: source `i`, or training."""
    color, border = ("ink", "solid") if i is None else (f"s{i % 8}", _BORDERS[i // 8 % 4])
    return f'<i class="key" style="border-top-color: var(--{color}); border-top-style: {border}"></i>'


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    """`head` is text, the cells of `rows` are HTML."""
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def _variables(colors: dict[str, str]) -> str:
    return " ".join(f"--{name}:{color};" for name, color in colors.items())
