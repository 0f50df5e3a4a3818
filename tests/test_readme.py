"""The README is the rendered index, and every link that stays in the repository leads somewhere."""
import re
from urllib.parse import unquote

import pytest
from tools.readme import from_root, outside_code, relink, render
from tools.repo import ROOT, pages, tracked

from arm.core import load_json
from arm.eval.suite import score_table

FILES = {str(p.path.relative_to(ROOT)): p.path for p in pages()} | {str(p.relative_to(ROOT)): p for p in tracked() if p.suffix == ".md"}
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)|<(?:img|a)\b[^>]*?\b(?:src|href)=\"([^\"]+)\"")


def prose(path) -> str:
    "The Markdown of a page or of a text file, without code."
    page = next((p for p in pages() if p.path == path), None)
    text = "\n\n".join(c.source for c in page.cells if c.kind == "markdown") if page else path.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```\s*$|`[^`\n]*`|\$\$.*?\$\$", "", text, flags=re.M | re.S)


def anchors(path) -> set[str]:
    "The anchors of a file's headings: as Jupyter makes them and as code hosts do."
    page = next((p for p in pages() if p.path == path), None)
    text = "\n\n".join(c.source for c in page.cells if c.kind == "markdown") if page else path.read_text(encoding="utf-8")
    heads = [re.sub(r"[`*]", "", h).strip() for h in re.findall(r"^#{1,6} +(.+?)\s*#*$", re.sub(r"^```.*?^```\s*$", "", text, flags=re.M | re.S), re.M)]
    return {h.replace(" ", "-") for h in heads} | {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


def test_readme_is_the_rendered_index():
    assert (ROOT/"README.md").read_text(encoding="utf-8") == render(), "run `make readme` and commit README.md"


@pytest.mark.parametrize("record, quick", [("models/tiny-rl/scores.json", False), ("studies/quick.json", True)])
def test_tables_are_those_of_the_records(record, quick):
    lost = [line for line in score_table(load_json(ROOT/"data"/record), quick=quick).splitlines() if line not in (ROOT/"README.md").read_text(encoding="utf-8")]
    assert not lost, f"run the index anew, then `make readme`; the README lacks {lost[:2]}"


def test_links_are_seen_from_the_root():
    assert from_root("00_core.ipynb") == "nbs/00_core.ipynb" and from_root("../LICENSE") == "LICENSE" and from_root("https://a.b/c") == "https://a.b/c"
    text = 'see [a](../x.md#y), ![p](images/p.png), <img src="images/q.png">, `[no](z)`\n```\n[no](z)\n```\n'
    assert outside_code(text, relink) == 'see [a](x.md#y), ![p](nbs/images/p.png), <img src="nbs/images/q.png">, `[no](z)`\n```\n[no](z)\n```\n'


@pytest.mark.parametrize("name", FILES)
def test_local_links_resolve(name):
    path, dead = FILES[name], []
    for m in LINK.finditer(prose(path)):
        link = unquote(m[1] or m[2])
        if re.match(r"(https?|mailto):", link): continue
        file, _, anchor = link.partition("#")
        target = (path.parent/file).resolve() if file else path
        if not target.exists() or not target.is_relative_to(ROOT): dead.append(link)
        elif anchor and target.suffix in (".ipynb", ".md") and anchor not in anchors(target): dead.append(link)
    assert not dead, f"{name} links to nothing: {', '.join(dead)}"


@pytest.mark.parametrize("name", FILES)
def test_links_to_papers_and_code_are_well_formed(name):
    for url in re.findall(r"https?://[^\s)>\"]+", prose(FILES[name])):
        if "arxiv.org" in url: assert re.match(r"https://arxiv\.org/(abs|pdf)/\d{4}\.\d{4,5}(v\d+)?$", url), f"write https://arxiv.org/abs/NNNN.NNNNN, not {url}"
        if "github.com" in url: assert re.match(r"https://github\.com/[\w.-]+/[\w.-]+", url), f"{url} names no repository"
