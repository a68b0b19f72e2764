import re
from html.parser import HTMLParser

import pytest

from vitrify.report import Fact, Picture, Report, Section, Table, figures, plots, render, write

VOID = {"meta", "path", "br", "img", "use", "line", "rect", "circle", "image"}


class Page(HTMLParser):
    """Collects what a page refers to, its ids and its text, and checks that tags close."""

    def __init__(self, source):
        super().__init__()
        self.references, self.ids, self.open, self.text = [], [], [], ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.references += [values[name] for name in ("src", "href", "xlink:href", "data", "action") if name in values]
        self.ids += [values["id"]] if "id" in values else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def source():
    curve = plots.Curve([2.0, 8.0], [1.0, 7.0], [3.0, 9.0])
    svg = figures.svg(plots.latency_curves({"one": plots.Comparison([197, 577], curve, curve, [1.0, 1.0])}))
    picture = Picture(svg, "two equal curves", 'caption with <tags> & "quotes"')
    table = Table(["name", "value"], [["<b>bold</b>", "1"]], "a table")
    sections = [Section("First", "Text < more", [picture, table]), Section("Second", "", [picture])]
    return render(Report("Title & more", "Lead", [Fact("3.1x", "fewer", "note")], sections, [("Machine", "a <cpu>")]))


def test_the_page_refers_to_nothing_outside_itself(source):
    page = Page(source)
    assert page.open == []
    assert all(reference.startswith(("#", "data:")) for reference in page.references), page.references
    # Names of XML namespaces look like addresses, but nobody fetches them.
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", source))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in source
    assert "<script" not in source


def test_text_is_escaped(source):
    page = Page(source)
    for text in ('caption with <tags> & "quotes"', "<b>bold</b>", "Text < more", "Title & more", "a <cpu>"):
        assert text in page.text
    assert "<b>bold" not in source


def test_two_pictures_share_no_id_and_still_find_their_own(source):
    page = Page(source)
    assert len(page.ids) == len(set(page.ids))
    assert page.ids, "the figures have clip paths, at least"
    targets = {reference[1:] for reference in page.references if reference.startswith("#")}
    targets |= set(re.findall(r"url\(#([^)]+)\)", source))
    assert targets
    assert targets <= set(page.ids)


def test_figures_take_the_ink_of_the_page(source):
    assert figures.INK not in source
    assert "currentColor" in source
    assert "prefers-color-scheme: dark" in source


def test_writing_replaces_the_file_and_leaves_no_draft(tmp_path):
    path = tmp_path / "deep" / "report.html"
    write(Report("One", "first"), path)
    write(Report("Two", "second"), path)
    assert "Two" in path.read_text()
    assert "One" not in path.read_text()
    assert list(path.parent.iterdir()) == [path]
