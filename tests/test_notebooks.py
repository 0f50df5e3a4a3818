"""What a page must be, whatever it is about."""
import ast
import re
from importlib import import_module

import pytest
from tools.repo import LIB, NBS, ROOT, modules, page_of, pages, tracked

PAGES = {p.name: p for p in pages()}
BOOK = {name: p for name, p in PAGES.items() if name != "index"}
# the folders of one machine, put together so that this line is none itself
MACHINE = re.compile(r"/(?:%s)/" % "|".join(["wor" + "k", "roo" + "t", "tm" + "p", "mn" + "t", "va" + "r/folders", r"hom" + r"e/\w+", "User" + "s"]))
FLAGS = {"slow", "gpu"}


def texts(output: dict) -> str:
    "Everything readable in a stored output."
    data = output.get("data", {})
    parts = [output.get("text", "")] + [v for k, v in data.items() if k.startswith("text/")] + output.get("traceback", [])
    return "\n".join("".join(p) for p in parts)


@pytest.mark.parametrize("page", BOOK.values(), ids=BOOK)
class TestPage:
    def test_has_title_and_subtitle(self, page):
        first = page.cells[0]
        lines = [line for line in first.source.splitlines() if line.strip()]
        assert first.kind == "markdown" and lines[0].startswith("# "), "the first cell must hold the title: # Title"
        assert len(lines) > 1 and lines[1].startswith("> "), "a line `> subtitle` must follow the title"
        assert not lines[1].rstrip().endswith(('"', "\\")), "the subtitle becomes a docstring: it may not end in a quote"
        assert sum(c.kind == "markdown" and c.source.startswith("# ") for c in page.cells) == 1, "one H1 per page"

    def test_name_says_what_it_exports(self, page):
        assert page.number, f"{page.path.name} must be NN_module.path.ipynb"
        if page.default_exp: assert page.default_exp == page.name.split("_", 1)[1]
        else: assert not any(c.exported for c in page.code), "exported cells, but no default_exp"

    def test_cells_have_ids(self, page):
        ids = [c.id for c in page.cells]
        assert all(ids) and len(set(ids)) == len(ids), "run nbdev_clean"

    def test_is_small(self, page): assert page.path.stat().st_size <= 1_000_000

    def test_outputs_are_clean(self, page):
        for cell in page.code:
            for out in cell.outputs:
                where = f"after: {cell.source[:80]!r}"
                assert out["output_type"] != "error", f"a stored error {where}"
                assert not any("widget" in k for k in out.get("data", {})), f"a stored widget {where}"
                assert out.get("name") != "stderr", f"a stored warning or progress bar {where}: {texts(out)[:200]}"
                assert "image/jpeg" not in out.get("data", {}), f"a picture stored twice {where}: show it with arm.show"

    def test_names_no_machine(self, page):
        for cell in page.cells:
            for text in [cell.source, *map(texts, cell.outputs)]:
                assert not MACHINE.search(text), f"a folder of one machine in {cell.source[:80]!r}: {MACHINE.search(text)[0]}"
            assert ".cuda()" not in cell.source, "take arm.core.pick_device"

    def test_flagged_cells_form_a_tail(self, page):
        flagged = [bool(FLAGS & set(c.directives)) for c in page.code if "hide" not in c.directives]
        assert flagged == sorted(flagged), "a cell that always runs follows a slow or gpu cell; move the flagged section to the end"

    def test_closes_with_the_export(self, page):
        if page.default_exp:
            last = page.code[-1]
            assert "hide" in last.directives and "nbdev_export()" in last.source, "the last code cell must be the hidden nbdev_export()"

    def test_uses_what_it_exports(self, page):
        if not page.default_exp: return
        used = set()
        for cell in page.code:
            if cell.exported: continue
            source = "\n".join("" if re.match(r"\s*[%!]", line) else line for line in cell.source.splitlines())
            for node in ast.walk(ast.parse(source)):
                used |= {node.id} if isinstance(node, ast.Name) else {node.attr} if isinstance(node, ast.Attribute) else set()
        public = import_module(f"arm.{page.default_exp}").__all__
        classes = {n for n in public if re.match(r"[A-Z]", n)}
        unused = [n for n in public if n not in used and not (n in classes and _returned_only(page, n))]
        assert not unused, f"exported, but no lesson shows: {', '.join(unused)}"

    def test_exported_cells_are_short(self, page):
        for cell in page.code:
            if cell.exported: assert len(cell.source.splitlines()) <= 60, f"an exported cell of {len(cell.source.splitlines())} lines: {cell.source[:60]!r}"


def _returned_only(page, name: str) -> bool:
    "A type that lessons meet as the annotated result of another exported function."
    annotations = re.compile(rf"(->|:|\[|\||=)[^#\n]*\b{name}\b")
    return any(c.exported and annotations.search(c.source) for c in page.code)


def test_numbers_are_unique():
    numbers = [p.number for p in BOOK.values()]
    assert len(set(numbers)) == len(numbers), f"twice: {sorted({n for n in numbers if numbers.count(n) > 1})}"


@pytest.mark.parametrize("name", modules())
def test_every_module_comes_from_its_page(name):
    page = page_of(modules()[name])
    assert page is not None, f"{name} was not exported by nbdev"
    assert page.exists(), f"the page of {name} is gone: delete the module too"
    assert page.name.split("_", 1)[1].removesuffix(".ipynb") == name.removeprefix("arm."), f"{name} says that it comes from {page.name}"
    lines = modules()[name].read_text(encoding="utf-8").count("\n")
    assert lines <= 320, f"{name} has {lines} lines; at most 320: make two pages of it"


def test_there_is_something_to_test():
    assert BOOK and modules() and (LIB/"__init__.py").exists() and (NBS/"index.ipynb").exists()


def test_no_large_files():
    large = [f"{p.relative_to(ROOT)} {p.stat().st_size/1e6:.1f} MB" for p in tracked() if p.suffix != ".safetensors" and p.stat().st_size > 1_000_000]
    assert not large, large


def test_all_weights_together_are_small():
    size = {p: p.stat().st_size for p in tracked() if p.suffix == ".safetensors"}
    assert sum(n for p, n in size.items() if p.parent.name == "tiny") <= 20_000_000 and sum(size.values()) <= 30_000_000
