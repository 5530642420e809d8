"""The built pages: every public name has its place in the reference, and no page is empty."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module

import pytest

import slimmable
from tests.docs.test_examples import ROOT

pytest.importorskip("mkdocs")
PUBLIC = [f"slimmable.{name}" for name in slimmable.__all__] + [
    f"slimmable.{room}.{name}" for room in slimmable._SUBMODULES for name in import_module(f"slimmable.{room}").__all__
]


class Page(HTMLParser):
    """The ids of a page, and the text of its article."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.words, self.inside = set(), 0, False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.ids |= {value for name, value in attributes if name == "id"}
        self.inside = self.inside or tag == "article"

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "article"

    def handle_data(self, text):
        self.words += len(text.split()) if self.inside else 0


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Return the pages of the site by path."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "--site-dir", str(site)]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    return {path.relative_to(site).as_posix(): Page(path.read_text()) for path in site.rglob("index.html")}


def test_every_public_name_is_in_the_reference(pages):
    known = set().union(*(page.ids for path, page in pages.items() if path.startswith("reference/")))
    assert [name for name in PUBLIC if name not in known] == []


def test_no_page_is_empty(pages):
    assert len(pages) > 50
    assert {path: page.words for path, page in pages.items() if page.words < 60} == {}
