"""Pieces of a page: escaped text, sections, what is folded away, and its looks."""

from __future__ import annotations

from swinv2_train.report.charts import CHART_CSS, CHART_JS, escaped

_MOST_TEXT, _MOST_FOLDED = 2000, 100_000
"""Characters of one piece of text on the page, and of one that is folded away."""


def page_html(title: str, body: str, looks: str = "") -> str:
    """A whole page, its looks and scripts within it.  looks: more rules of its looks."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{esc(title)}</title><style>{_PAGE_CSS}{CHART_CSS}{looks}</style></head><body><main>{body}"
        f"</main><script>{CHART_JS}</script></body></html>\n"
    )


def section(title: str, body: str) -> str:
    """A part of the page under a title; nothing where it is empty."""
    return f"<section><h2>{esc(title)}</h2>{body}</section>" if body else ""


def folded(title: str, text: str) -> str:
    """Text that is shown when its title is clicked at; nothing where it is empty."""
    shown = escaped(text, _MOST_FOLDED, lines=True)
    return f"<details><summary>{esc(title)}</summary><pre>{shown}</pre></details>" if text else ""


def esc(text: str) -> str:
    """Text in which no character is markup, cut at a length."""
    return escaped(text, _MOST_TEXT)


_PAGE_CSS = """
:root{--page:#f6f7f9;--card:#fff;--text:#1c2430;--soft:#667085;--edge:#e3e6eb;--good:#177245;--bad:#b42318;--wait:#9a6700}
@media (prefers-color-scheme:dark){
:root{--page:#12161c;--card:#1a2028;--text:#e4e8ee;--soft:#98a2b3;--edge:#2c3440;--good:#67c893;--bad:#f97066;--wait:#e2b340}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.5 system-ui,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:24px 16px 48px}
h1{font-size:26px;line-height:1.25;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:18px;margin:34px 0 12px}
p{margin:2px 0}
header p{overflow-wrap:anywhere}
.soft{color:var(--soft)}.small{font-size:12px}
.state{display:inline-block;font-size:13px;font-weight:600;padding:2px 10px;border-radius:99px;
border:1px solid currentColor;vertical-align:4px;white-space:nowrap;color:var(--wait)}
.state.done{color:var(--good)}.state.idle{color:var(--soft)}.state.failed{color:var(--bad)}
.bar{height:12px;border-radius:3px;background:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(145px,1fr));gap:12px;margin-top:20px}
.tile{background:var(--card);border:1px solid var(--edge);border-radius:8px;padding:10px 14px}
.tile .soft{font-size:13px}
.big{font-size:25px;font-weight:600;line-height:1.3;font-variant-numeric:tabular-nums}
.big small{font-size:13px;font-weight:400;color:var(--soft)}
.picture{margin:0 0 14px}
.picture img{display:block;max-width:100%;height:auto;border:1px solid var(--edge);border-radius:8px;background:#fff}
.picture figcaption{font-size:13px;color:var(--soft);margin-top:4px}
details{margin:0 0 14px}
details>*:not(summary){margin-top:10px}
summary{cursor:pointer;padding:8px 0}
pre{margin:0;padding:12px 14px;overflow-x:auto;font-size:13px;line-height:1.45;
background:var(--card);border:1px solid var(--edge);border-radius:8px}
.wide{overflow-x:auto}
table{border-collapse:collapse;background:var(--card);border:1px solid var(--edge);border-radius:8px;font-size:14px}
td,th{padding:5px 14px;border-top:1px solid var(--edge);text-align:left;vertical-align:top}
tr:first-child>*{border-top:0}
th{font-weight:600;color:var(--soft);font-size:13px}
.numbers td:nth-child(n+3),.numbers th:nth-child(n+3){
text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
"""
