"""The HTML of a page that needs nothing beside it: its style, and its pieces."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from PIL import Image

from engine.common.pictures import DARK, LIGHT
from engine.runs.reporting.tables import ReportTable

_STYLE = (
    f"""
:root {{ color-scheme: light dark; --paper: {LIGHT.background}; --ink: {LIGHT.text}; --line: {LIGHT.grid};
  --soft: #f3f5f7; --link: #005a9c; --quiet: #595f66; }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: {DARK.background}; --ink: {DARK.text};
  --line: {DARK.grid}; --soft: #1f2328; --link: #7cb7ff; --quiet: #a3a9b0; }} }}
"""
    + """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; max-width: 76rem; margin: 0 auto;
  padding: 1rem clamp(1rem, 4vw, 2.5rem) 4rem; background: var(--paper); color: var(--ink);
  overflow-wrap: break-word; }
h1 { font-size: 1rem; font-weight: 600; letter-spacing: .02em; color: var(--quiet); margin: 0 0 .4rem; }
h2 { font-size: 1.4rem; line-height: 1.25; border-top: 1px solid var(--line); padding-top: 1.4rem;
  margin: 2.6rem 0 .6rem; overflow-wrap: anywhere; }
h3 { font-size: 1.05rem; line-height: 1.3; margin: 1.6rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .5rem 0; max-width: 48rem; overflow-wrap: anywhere; }
a { color: var(--link); }
.headline { font-size: clamp(1.15rem, 2.4vw, 1.45rem); line-height: 1.4; margin: 0 0 1rem; max-width: 54rem; }
.quiet, .download { color: var(--quiet); font-size: .875rem; }
nav ul { margin: .6rem 0; padding-left: 1.2rem; }
nav a { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; max-width: 100%; margin: .8rem 0 .2rem; border: 1px solid var(--line);
  border-radius: 6px; }
.scroll:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: .9rem; min-width: 100%; }
th, td { padding: .4rem .75rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { background: var(--soft); font-weight: 600; vertical-align: bottom; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; max-width: 34rem; overflow-wrap: break-word; min-width: 4.5rem; }
tbody tr:last-child td { border-bottom: 0; }
td.number { text-align: right; white-space: nowrap; }
th.number { text-align: right; }
td.name { min-width: 9.5rem; max-width: 22rem; font-weight: 600; position: sticky; left: 0;
  background: var(--paper); border-right: 1px solid var(--line); }
th.name { position: sticky; left: 0; border-right: 1px solid var(--line); }
td.name small { font-weight: 400; }
td.number:first-child { min-width: 3rem; }
.download { margin: .1rem 0 .8rem; }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); }
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; border-radius: 6px; }
.drawn img { border: 1px solid var(--line); width: 100%; }
.curves { max-width: 38rem; }
.found img { background: white; }
figcaption { color: var(--quiet); font-size: .875rem; margin-top: .3rem; overflow-wrap: anywhere; }
details { margin: .7rem 0; }
summary { cursor: pointer; font-weight: 600; padding: .2rem 0; overflow-wrap: anywhere; }
"""
)


_COLOURS = 128  # of a drawn picture, edges of letters too


@dataclass(frozen=True)
class Drawn:
    """A picture in two palettes. alt: what is seen on it."""

    light: bytes
    dark: bytes
    alt: str


@dataclass
class PageSection:
    """A part of the page, and the tables on it in their order."""

    title: str
    parts: list[str] = field(default_factory=list)
    tables: list[ReportTable] = field(default_factory=list)

    def add(self, *parts: str) -> None:
        """Append HTML."""
        self.parts += parts

    def add_table(self, table: ReportTable, heading: str = "") -> None:
        """Append a table under a heading."""
        self.tables.append(table)
        self.add(h3(heading) if heading else "", table.html())

    def add_folded(self, summary: str, table: ReportTable) -> None:
        """Append a table that is folded."""
        self.tables.append(table)
        self.add(details(summary, table.html()))


def document(headline: Sequence[str], sections: Sequence[PageSection], title: str = "engine report") -> str:
    """The whole page."""
    contents = "".join(
        f'<li><a href="#s{number}">{escape(section.title)}</a></li>' for number, section in enumerate(sections)
    )
    body = "".join(
        f'<section id="s{number}"><h2>{escape(section.title)}</h2>{"".join(section.parts)}</section>'
        for number, section in enumerate(sections)
    )
    first, *others = (escape(sentence) for sentence in headline or [""])
    said = (f'<p class="headline">{first}</p>' if first else "") + "".join(f"<p>{other}</p>" for other in others)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><header><h1>{escape(title)}</h1>{said}</header>"
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav><main>{body}</main></body></html>\n'
    )


def h3(text: str) -> str:
    """A heading inside a section."""
    return f"<h3>{escape(text)}</h3>"


def note(text: str) -> str:
    """A remark."""
    return f'<p class="quiet">{escape(text)}</p>'


def details(summary: str, content: str) -> str:
    """HTML that is folded."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def drawn(picture: Drawn, caption: str = "") -> str:
    """A picture that follows the page's light or dark mode."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        '<figure class="drawn"><picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="{_png(small(picture.dark))}"><img alt="{escape(picture.alt, quote=True)}" '
        f'src="{_png(small(picture.light))}"></picture>{below}</figure>'
    )


def found(content: bytes, alt: str, caption: str) -> str:
    """A picture of a file as it is."""
    return (
        f'<figure class="found"><img alt="{escape(alt, quote=True)}" src="{_png(content)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def grid(pictures: Iterable[str]) -> str:
    """Pictures side by side where there is room."""
    inside = "".join(pictures)
    return f'<div class="pictures">{inside}</div>' if inside else ""


def mapping(name: str, values: Mapping[str, Any]) -> ReportTable:
    """Nested keys as lines of a table."""
    return ReportTable(name, ("key", "value"), [(key, str(value)) for key, value in _flat(values)])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def small(content: bytes) -> bytes:
    """A drawn picture in a third of its bytes: few colours, and no transparency."""
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    small = io.BytesIO()
    picture.quantize(_COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(small, "PNG")
    return small.getvalue()


def _png(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
