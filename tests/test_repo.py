"""Hygiene of the whole repository: what lies in it, and what must not be written in it."""
import os
import re
import subprocess

import pytest
from tools import check
from tools.repo import ROOT, text_of, tracked

TOP = {"nbs", "arm", "data", "tests", "settings.ini", "setup.py", "pyproject.toml", "constraints.txt", "README.md", "Makefile", ".ci", "LICENSE",
       "CONTRIBUTING.md", ".gitignore"}
# put together from halves, so that this file does not hold what it looks for
HOSTS = ["py" + "pi.org", "python" + "hosted.org", "npm" + "js.org", "npm" + "js.com", "ana" + "conda.org", "proxy.golang" + ".org", "local" + "host:", "127.0." + "0.1:"]
MACHINE = ["/wor" + "k/", "/roo" + "t/", "/tm" + "p/", "/mn" + "t/", "/opt/wh" + "eels", "/User" + "s/", "C:\\" + "Users"]
WORDS = [r"\bTO" + r"DO\b", r"\bFIX" + r"ME\b", r"\bXX" + r"X\b", r"^<<<<" + r"<<< ", r"^>>>>" + r">>> ", r"\bbreak" + r"point\(\)", r"\bimport p" + r"db\b", r"as an A" + r"I\b"]
BAD = re.compile("|".join([re.escape(s) for s in HOSTS + MACHINE] + WORDS + [r"/hom" + r"e/\w+"]), re.M)


@pytest.mark.parametrize("path", [str(p.relative_to(ROOT)) for p in tracked()])
def test_names_no_machine_no_registry_and_no_unfinished_business(path):
    text = text_of(ROOT/path)
    if text is None or path == "LICENSE": return
    if path.endswith(".ipynb"): text = re.sub(r'"image/[^"]+": "[^"]*"', "", text)
    m = BAD.search(text)
    assert m is None, f"{path}: {text[max(0, m.start()-40):m.end()+40]!r}"


def test_the_first_gate_looks_at_all_code(monkeypatch):
    seen = []
    monkeypatch.setattr(check, "run", lambda *words: seen.extend(words) or 0)
    assert check.names() == 0
    assert not [p for p in tracked() if p.suffix in (".py", ".ipynb") and not {str(p.relative_to(ROOT)), p.relative_to(ROOT).parts[0]} & set(seen)]
    monkeypatch.undo()
    assert check.names() == 0


def test_a_gate_sees_what_a_command_changes_adds_and_removes(tmp_path, monkeypatch, capsys):
    git = lambda *words: subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    git("init", "-q")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "git", lambda *words: [n for n in git(*words, "-z").split("\0") if n])
    def does(act):
        for name in ("a", "b"): (tmp_path/name).write_text(name)
        (tmp_path/"c").unlink(missing_ok=True)
        git("add", "-A")
        monkeypatch.setattr(check, "run", lambda *words: act() or 0)
        return check.no_op("anything"), capsys.readouterr().out.split()
    assert does(lambda: None) == (False, [])
    assert does(lambda: (tmp_path/"c").write_text("x") and None) == (True, ["new:", "c"])  # a page without its module
    assert does((tmp_path/"a").unlink) == (True, ["gone:", "a"]) and does(lambda: (tmp_path/"b").write_text("x") and None) == (True, ["changed:", "b"])
    assert does(lambda: 3)[0] == 3  # the command itself failed


def test_gates_stop_at_the_first_failure(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(check, "STEPS", [(n, lambda n=n: seen.append(n) or int(n == "b"), "mend it") for n in "abc"])
    assert check.main() == 1 and seen == ["a", "b"] and "[2/3] b: FAILED" in capsys.readouterr().out


def test_make_installs_once(tmp_path):
    for name in ("Makefile", "settings.ini", "setup.py", "pyproject.toml", "constraints.txt"): (tmp_path/name).write_bytes((ROOT/name).read_bytes())
    dry = lambda: subprocess.run(["make", "-n", "demo"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "pip install" in dry() and "arm demo" in dry()
    (tmp_path/".venv").mkdir()
    (tmp_path/".venv"/".installed").touch()
    assert "pip install" not in dry() and "arm demo" in dry()


def test_only_what_belongs_lies_at_the_top():
    assert {p.relative_to(ROOT).parts[0] for p in tracked()} <= TOP


def test_caches_and_runs_are_ignored():
    inside = ["data/cache/x.npz", "runs/demo/report.html", ".venv/bin/python", "lightning_logs/version_0/x", "a.ckpt", "nbs/.ipynb_checkpoints/x.ipynb", "arm.egg-info/PKG-INFO"]
    done = subprocess.run(["git", "check-ignore", "--no-index", *inside], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == inside


def test_continuous_integration_runs_the_tests():
    assert os.access(ROOT/".ci/run", os.X_OK) and "make test" in (ROOT/".ci/run").read_text()


def test_constraints_pin_every_requirement_and_nothing_else():
    from configparser import ConfigParser
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT/"settings.ini")
    asked = {re.match(r"[\w.-]+", r)[0] for k in settings["DEFAULT"] if k == "requirements" or k.endswith("_requirements") for r in settings["DEFAULT"][k].split()}
    pinned = {line.split("==")[0] for line in (ROOT/"constraints.txt").read_text().splitlines() if line and line[0] != "#"}
    assert asked == pinned
