"""Whole files or none, for whoever writes one: the old content stands, no draft is left, the error names the path."""

import errno
import os

import pytest

from vitrify import VitrifyError, files
from vitrify.report import html


@pytest.mark.parametrize("content", ["größer\n", b"\x00\xff"])
def test_the_content_is_written_as_it_is_and_the_folder_made(tmp_path, content):
    path = tmp_path / "new" / "a.txt"
    files.write_atomically(path, "old")
    files.write_atomically(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_replaced_is_named_and_nothing_is_left(tmp_path):
    path = tmp_path / "config.json"
    path.mkdir()  # a file cannot take its place
    with pytest.raises(VitrifyError, match=r"could not write .*config\.json: Is a directory"):
        files.write_atomically(path, "new")
    assert list(tmp_path.iterdir()) == [path]


def test_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VitrifyError, match=r"could not write .*a\.json: (Not a directory|File exists)"):
        files.write_atomically(tmp_path / "file" / "a.json", "")


def test_a_report_on_a_full_disk_leaves_the_earlier_one(tmp_path, monkeypatch):
    path = html.write(html.Report("first", "lead"), tmp_path / "report.html")
    before = path.read_text()

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(VitrifyError, match=r"could not write .*report\.html: No space left on device"):
        html.write(html.Report("second", "lead"), path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]
