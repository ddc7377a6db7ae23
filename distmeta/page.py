"""Static pages of tables and pictures, which load nothing: a page can be sent on by itself."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distmeta.runs import storage_errors

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #595959; --line: #d0d0d0; --back: #f4f4f4 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #161616; --soft: #a8a8a8; --line: #444; --back: #222 }
}
body { margin: 0; color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 72rem; margin: auto; padding: 1.5rem }
h1 { font-size: 1.5rem; overflow-wrap: anywhere }
.wide { overflow-x: auto }
table { border-collapse: collapse }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; min-width: 5.5rem; font-variant-numeric: tabular-nums }
th[scope=row] { color: var(--soft); font-weight: normal; white-space: nowrap }
figure { margin: 2rem 0 }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px }
figcaption, .note { color: var(--soft); max-width: 48rem }
pre { padding: 1rem; background: var(--back); overflow-x: auto }
summary { cursor: pointer; padding: .3rem 0 }
"""


class Picture(NamedTuple):
    """A figure of the page, or the reason why it is left out."""

    name: str
    caption: str
    figure: Figure | None
    missing: str


def write_page(folder: Path, title: str, blocks: Sequence[str | Picture]) -> Path:
    """Writes ``index.html`` of HTML and pictures, and each picture as a PNG beside it.

    Raises:
        StorageError: The folder cannot be written.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    body = [block if isinstance(block, str) else _picture(block, folder) for block in blocks]
    page = folder / "index.html"
    text = "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)} – distmeta</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>",
            f"<h1>{escape(title)}</h1>",
            *body,
            "</main>\n</body>\n</html>\n",
        ]
    )
    with storage_errors(page):
        page.write_text(text, encoding="utf-8")
    return page


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose rows begin with their headings."""
    lines = ["<tr><td></td>" + "".join(f'<th scope="col">{escape(name)}</th>' for name in header[1:]) + "</tr>"]
    for heading, *cells in rows:
        row = "".join(f"<td>{escape(cell or '–')}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{escape(heading)}</th>{row}</tr>')
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def note(text: str) -> str:
    """A paragraph of small print."""
    return f"<p class=note>{escape(text)}</p>"


def folded(title: str, text: str) -> str:
    """Text as it stands in a file, to be folded out."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def save(figure: Figure, path: Path) -> None:
    """Writes ``figure`` as a PNG.

    Raises:
        StorageError: It cannot be written.
    """
    with storage_errors(path):
        FigureCanvasAgg(figure).print_figure(path, dpi=120, facecolor="white", format="png")


def _picture(picture: Picture, folder: Path) -> str:
    """The picture as it stands in the page; its PNG is written to ``folder``."""
    if picture.figure is None:
        return f"<p class=note>No picture <code>{picture.name}.png</code>: {escape(picture.missing)}.</p>"
    path = folder / f"{picture.name}.png"
    save(picture.figure, path)
    data = base64.b64encode(path.read_bytes()).decode()
    caption = escape(picture.caption)
    return (
        f'<figure><a href="{path.name}"><img src="data:image/png;base64,{data}" alt="{caption}"></a>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
