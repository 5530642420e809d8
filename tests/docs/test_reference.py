"""The built pages: every public name has its place in the reference and in its index, and no page is empty."""

import importlib.util
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from tests.docs.test_examples import ROOT

pytest.importorskip("properdocs")
_SPEC = importlib.util.spec_from_file_location("name_index", ROOT / "docs" / "extensions" / "name_index.py")
name_index = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(name_index)
PUBLIC = name_index.public_names()


class Page(HTMLParser):
    """The ids of a page, its links to what is in the reference, and the number of words of its article."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.references, self.words, self.inside = set(), [], 0, False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found.get("id")}
        if "autorefs" in (found.get("class") or "").split():
            self.references.append(found["href"])
        self.inside = self.inside or tag == "article"

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "article"

    def handle_data(self, text):
        self.words += len(text.split()) if self.inside else 0


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Return the pages of the site by path."""
    site = tmp_path_factory.mktemp("site")
    # Not with -q, under which --strict overlooks warnings.
    command = [sys.executable, "-m", "properdocs", "build", "--strict", "--site-dir", str(site)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return {path.relative_to(site).as_posix(): Page(path.read_text()) for path in site.rglob("index.html")}


def test_every_public_name_leads_to_its_place_in_the_reference(pages):
    """What two modules export has one place, under one of its names; a link by the other leads there too."""
    links = [link.partition("#") for link in pages["reference/index.html"].references]
    assert len(links) == name_index.PAGE.read_text().count("| [`")
    assert [anchor for page, _, anchor in links if anchor not in pages[f"reference/{page}index.html"].ids] == []
    assert {anchor.rpartition(".")[2] for _, _, anchor in links} <= {name.rpartition(".")[2] for name in PUBLIC}


def test_the_index_is_made_from_the_public_names():
    page = name_index.PAGE.read_text()
    assert page == name_index.with_names(page), "run: PYTHONPATH=. python docs/extensions/name_index.py"
    assert all(f"`{place}`" in page and f"[`{name}`]" in page for place, _, name in (n.rpartition(".") for n in PUBLIC))


def test_no_page_is_empty(pages):
    assert len(pages) > 50
    assert {path: page.words for path, page in pages.items() if page.words < 60} == {}
