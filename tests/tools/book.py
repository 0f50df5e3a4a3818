"""All pages as one static site with search: `python tests/tools/book.py [OUT]` (make docs); pages are rendered as stored, and every link is followed."""
import html
import json
import logging
import posixpath
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.repo import NBS, ROOT  # noqa: E402

ROW = re.compile(r"^\| \[([^\]]+)\]\(([^)]+\.ipynb)\)", re.M)
HREF = re.compile(r"(<(?:a|img|link|script|source)\b[^<>]*?\s(?:href|src)=\")([^\"]+)(\")")
LAYERS = {"0": "Ground", "1": "Data", "2": "Tokenizer", "3": "Model", "4": "Training", "5": "Evaluation", "6": "Reinforcement learning", "9": "Applications"}


def chapters() -> list[tuple[str, str]]:
    "(title, file) of every page, in the reading order of the index."
    text = "".join("".join(c["source"]) for c in json.loads((NBS/"index.ipynb").read_text())["cells"] if c["cell_type"] == "markdown")
    return ROW.findall(text)


def config(out: Path, pages: list[tuple[str, str]]) -> dict:
    "Settings of mkdocs: one chapter per layer."
    parts = {}
    for title, file in pages: parts.setdefault(LAYERS[file[0]], []).append({title: file})
    return dict(site_name="arm", docs_dir=str(NBS), site_dir=str(out), use_directory_urls=False, strict=False, nav=[{"Start": "index.ipynb"}, *({k: v} for k, v in parts.items())],
                theme=dict(name="material", font=False, features=["navigation.footer", "toc.follow"]),
                plugins=["search", {"mkdocs-jupyter": dict(execute=False, include_source=False, ignore_h1_titles=True)}], validation=dict(links=dict(not_found="ignore", unrecognized_links="ignore")))


def relink(page: Path, site: Path) -> list[str]:
    "Links to notebooks become links to pages, files of the repository come along; returns what leads nowhere."
    lost = []
    def change(m):
        target = html.unescape(m[2])
        if re.match(r"[a-z]+:|//|#", target) or not target: return m[0]
        path, mark, anchor = target.partition("#")
        if path.endswith(".ipynb"): path = path[:-6] + ".html"
        inside = posixpath.normpath(posixpath.join(page.parent.relative_to(site).as_posix(), unquote(path)))
        if inside.startswith("../"):  # a file of the repository beside nbs/
            source, inside = ROOT/inside[3:], "files/" + inside[3:]
            if source.is_file(): (site/inside).parent.mkdir(parents=True, exist_ok=True); shutil.copy(source, site/inside)
            elif source.is_dir(): return f"{m[1]}#{m[3]}"
            path = posixpath.relpath(inside, page.parent.relative_to(site).as_posix())
        if not (site/inside).exists(): lost.append(f"{page.name}: {target}")
        return f"{m[1]}{html.escape(path + mark + anchor)}{m[3]}"
    text = page.read_text(encoding="utf-8")
    page.write_text(HREF.sub(change, text), encoding="utf-8")
    return lost


def build(out: Path) -> list[str]:
    "The site, and the links in it that lead nowhere."
    from mkdocs.commands.build import build as render
    from mkdocs.config import load_config
    logging.getLogger("mkdocs").setLevel(logging.ERROR)
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = out.parent/f"{out.name}.yml"  # JSON is YAML
    settings.write_text(json.dumps(config(out, chapters())))
    render(load_config(str(settings)))
    settings.unlink()
    return [x for page in sorted(out.rglob("*.html")) if page.name != "404.html" for x in relink(page, out)]


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT/"runs"/"book").resolve()
    lost = build(out)
    print("\n".join([*(f"leads nowhere: {x}" for x in lost), f"{len(list(out.glob('*.html')))} pages: {out/'index.html'}"]))
    sys.exit(bool(lost))
