"""README.md from nbs/index.ipynb, as stored: `python tests/tools/readme.py` writes it, `--check` compares."""
import posixpath
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.repo import NBS, ROOT  # noqa: E402

LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))|(<img[^>]*\bsrc=\")([^\"]+)(\")")


def from_root(target: str) -> str:
    "A link of a file in nbs/ as a link of a file in the root."
    if re.match(r"[a-z]+:|#|/", target): return target
    return posixpath.normpath(posixpath.join("nbs", target))


def outside_code(text: str, change) -> str:
    "Apply `change` to everything but fenced and inline code."
    parts = re.split(r"(^```.*?^```[ ]*$|`[^`\n]*`)", text, flags=re.M | re.S)
    return "".join(part if k % 2 else change(part) for k, part in enumerate(parts))


def relink(text: str) -> str:
    "Every link and picture of the index, seen from the root."
    return LINK.sub(lambda m: (m[1] or m[4]) + from_root(m[2] or m[5]) + (m[3] or m[6]), text)


def render() -> str:
    "The README that the stored index stands for."
    import nbformat
    from nbconvert import MarkdownExporter
    nb = nbformat.read(NBS/"index.ipynb", as_version=4)
    kept = []
    for cell in nb.cells:
        directive = set(re.findall(r"^#\s*\|\s*(\w+(?::\s*\w+)?)", cell.source, re.M)) if cell.cell_type == "code" else set()
        if "hide" in directive: continue
        if cell.cell_type == "code":
            pictures = [o for o in cell.outputs if any(k.startswith("image/") for k in o.get("data", {}))]
            if pictures: raise SystemExit("nbs/index.ipynb stores a picture as an output; save it under nbs/images and link it")
            cell.source = re.sub(r"^#\s*\|.*\n?", "", cell.source, flags=re.M)
            if "echo: false" in directive: cell.source = ""
        kept.append(cell)
    nb.cells = kept
    text, resources = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r"^```(?:python)?\n+```\n", "", text, flags=re.M)  # the frame of a code cell that is not shown
    text = outside_code(text, relink)
    head = "<!-- Written from nbs/index.ipynb by `make readme`; change it there. -->\n\n"
    return head + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def main() -> int:
    readme = ROOT/"README.md"
    if "--check" not in sys.argv:
        readme.write_text(render(), encoding="utf-8")
        return 0
    if readme.is_file() and readme.read_text(encoding="utf-8") == render(): return 0
    print("README.md differs from nbs/index.ipynb: run `make readme` and commit it")
    return 1


if __name__ == "__main__": sys.exit(main())
