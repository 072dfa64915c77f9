"""HTML page in one file: images embedded, no external resources, no scripts."""

import base64
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path

_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; color: #222;
       max-width: 1100px; margin: 2.5rem auto 5rem; padding: 0 1.2rem; background: #fff; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; padding-top: .8rem; border-top: 1px solid #ddd; }
p, li { max-width: 46rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; display: block; margin: .6rem 0; }
details { margin: .4rem 0; border: 1px solid #ddd; border-radius: 4px; padding: .4rem .8rem; }
summary { cursor: pointer; font-weight: 600; }
.note { color: #666; font-size: .88rem; }
code { font-size: .9em; }
"""


@dataclass(frozen=True)
class Section:
    """A heading, text (trusted HTML) and images; `folds` are collapsible, titled groups of images."""

    title: str
    text: str = ""
    images: tuple[tuple[str, Path], ...] = ()
    folds: tuple[tuple[str, tuple[tuple[str, Path], ...]], ...] = ()


def page(title: str, lead: str, table: tuple[list[str], list[list[str]]], sections: list[Section], notes) -> str:
    """The complete document. `lead` and `table` are plain text and are escaped here."""
    head, rows = table
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_CSS}</style></head><body>",
        f"<h1>{escape(title)}</h1><p>{escape(lead)}</p>",
        f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>',
    ]
    if notes:
        parts.append('<ul class="note">' + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
    for section in sections:
        parts.append(f"<h2>{escape(section.title)}</h2>")
        if section.text:
            parts.append(f"<p>{section.text}</p>")
        parts += [_image(*image) for image in section.images]
        for number, (name, images) in enumerate(section.folds):
            opened = " open" if number == 0 else ""
            shown = "".join(f"<p><code>{escape(alt)}</code></p>{_image(alt, path)}" for alt, path in images)
            parts.append(f"<details{opened}><summary>{escape(name)}</summary>{shown}</details>")
    return "\n".join([*parts, "</body></html>", ""])


def _image(alt: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{escape(alt, quote=True)}" src="data:image/png;base64,{data}">'


def number(value, form: str = ",.2f") -> str:
    """A table cell: the formatted value, or a dash if it is missing or not finite."""
    return "–" if value is None or (isinstance(value, float) and not math.isfinite(value)) else format(value, form)
