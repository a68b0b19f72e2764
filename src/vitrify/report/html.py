"""One HTML file from plain data: everything inline, nothing fetched, readable in light and dark.

A `Report` is facts and sections, a section is text, tables and pictures. Whatever fills them (the demo, an
experiment, a design-space exploration) builds these values and calls `write`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from matplotlib.figure import Figure

from vitrify.files import write_atomically
from vitrify.report import figures


@dataclass(frozen=True)
class Fact:
    """A number worth seeing first, what it is, and what it compares with."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """An SVG document (`figures.svg`), the text for who cannot see it, and a caption that says what to look at."""

    svg: str
    alt: str
    caption: str

    @classmethod
    def of(cls, figure: Figure, alt: str, caption: str) -> Picture:
        """Return the picture of a matplotlib figure."""
        return cls(figures.svg(figure), alt, caption)


@dataclass(frozen=True)
class Table:
    """Rows of text below a header; the first column names the row, the others are aligned as numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Widget:
    """Markup that a page makes by itself, script included, for what neither picture nor table shows. Not escaped."""

    markup: str


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, and what it shows."""

    title: str
    text: str = ""
    items: Sequence[Picture | Table | Widget] = ()


@dataclass(frozen=True)
class Report:
    """A page: `lead` says in a sentence or two what this is, `colophon` where and from what it was made."""

    title: str
    lead: str
    facts: Sequence[Fact] = ()
    sections: Sequence[Section] = ()
    colophon: Sequence[tuple[str, str]] = field(default_factory=tuple)


def render(report: Report) -> str:
    """Return the page as one HTML document that refers to nothing outside itself. All text is escaped."""
    style = resources.files("vitrify.report").joinpath("style.css").read_text(encoding="utf-8")
    facts = "".join(
        f"<li><b>{_text(fact.value)}</b><span>{_text(fact.label)}</span><small>{_text(fact.note)}</small></li>"
        for fact in report.facts
    )
    counter = iter(range(10_000))
    sections = "".join(_section(section, counter) for section in report.sections)
    colophon = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in report.colophon)
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{_text(report.title)}</title>\n<style>{style}</style></head>\n<body><main>"
        f'<h1>{_text(report.title)}</h1>\n<p class="lead">{_text(report.lead)}</p>\n'
        + (f'<ul class="facts">{facts}</ul>\n' if facts else "")
        + sections
        + (f"<footer><dl>{colophon}</dl></footer>" if colophon else "")
        + "</main></body>\n</html>\n"
    )


def write(report: Report, path: Path) -> Path:
    """Render to `path`, whole or not at all; its folder is made. Returns `path`."""
    write_atomically(path, render(report))
    return path


def _section(section: Section, counter: Iterator[int]) -> str:
    body = f"<p>{_text(section.text)}</p>" if section.text else ""
    for item in section.items:
        if isinstance(item, Widget):
            body += item.markup
        else:
            body += _table(item) if isinstance(item, Table) else _picture(item, next(counter))
    return f"<section><h2>{_text(section.title)}</h2>{body}</section>\n"


def _picture(picture: Picture, number: int) -> str:
    return (
        f'<figure><div role="img" aria-label="{_text(picture.alt)}">{_inline_svg(picture.svg, f"f{number}-")}</div>'
        f"<figcaption>{_text(picture.caption)}</figcaption></figure>\n"
    )


def _inline_svg(svg: str, prefix: str) -> str:
    """Make an SVG document part of a page: no prologue, ids that cannot clash, ink in the page's own text colour."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return svg.replace(figures.INK, "currentColor")


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in table.header)
    rows = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>' + "".join(f"<td>{_text(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in table.rows
    )
    caption = f"<caption>{_text(table.caption)}</caption>" if table.caption else ""
    return f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>\n'


def _text(text: str) -> str:
    return html.escape(text)
