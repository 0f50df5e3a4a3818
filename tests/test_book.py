"""The pages as a book: every page is in it, in reading order, every link leads somewhere, and its search knows the words of the pages."""
import json
import shutil

import pytest
from tools.book import build, chapters
from tools.repo import NBS


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    out = tmp_path_factory.mktemp("book")/"site"
    return out, build(out)


def test_every_page_is_a_chapter(book):
    out, _ = book
    pages = {p.name for p in NBS.glob("[0-9]*.ipynb")}
    assert {file for _, file in chapters()} == pages and all((out/f"{name[:-6]}.html").is_file() for name in [*pages, "index.ipynb"])


def test_every_link_leads_somewhere(book):
    _, lost = book
    assert not lost, "\n".join(lost)


def test_a_broken_link_is_found(book, tmp_path):
    from tools.book import relink
    shutil.copytree(book[0], tmp_path/"site")
    page = tmp_path/"site"/"index.html"
    page.write_text(page.read_text().replace("</body>", '<a href="nowhere.ipynb">x</a></body>'))
    assert relink(page, tmp_path/"site") == ["index.html: nowhere.ipynb"]


def test_search_knows_the_pages(book):
    found = json.loads((book[0]/"search"/"search_index.json").read_text())["docs"]
    assert any("advantage" in d["text"].lower() and d["location"].startswith("60_rl.grpo") for d in found)
