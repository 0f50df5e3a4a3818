"""Reports of runs that are whole, damaged, or written by somebody who means harm: one file, nothing outside it, and words in place of failures."""
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from arm.app.cli import main
from arm.app.runreport import run_report, write_run_report
from arm.app.runs import note_start, read_run
from arm.core import save_json
from arm.train.curves import load_references, read_curves
from PIL import Image
from tools.repo import ROOT
from tools.strangers import png, refusal, run

EVIL = "\"><script>alert('x')</script><img src=x onerror=alert(1)>"
REFERENCES = load_references()
VOID = {"img", "meta", "br", "line", "circle"}


class Page(HTMLParser):
    "Strict: tags close in order; addresses and handlers are collected."
    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.words, self.tags, self.bad = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID: self.open.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "action", "data", "srcset", "poster", "xlink:href")]
        self.bad += [k for k, _ in attrs if k.startswith("on")]

    def handle_startendtag(self, tag, attrs): self.tags.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag, tag
    def handle_data(self, data): self.words.append(data)

    @property
    def text(self): return " ".join(" ".join(self.words).split())


def checked(text: str) -> Page:
    "A page that any browser shows, and that loads nothing."
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags) and not page.bad
    assert all(re.match(r"#p\d+$|data:image/png;base64,[A-Za-z0-9+/=]+$", a) for a in page.addresses), page.addresses
    assert not re.search(r"url\(|@import", text) and "default-src 'none'" in text and 'name="viewport"' in text
    return page


def stage(folder: Path, kind: str, factor: float = 1., samples: int = 3):
    "A stage that follows the short reference's second seed, times a factor."
    curves = next(r for r in REFERENCES if (r.name, r.stage) == ("quick120", kind)).runs["seed 1"]
    (folder/kind/"log").mkdir(parents=True)
    steps = next(iter(curves.values()))[0]
    lines = [",".join(["epoch", "step", *curves])] + [",".join(map(str, [0, s, *(c[1][i]*factor for c in curves.values())])) for i, s in enumerate(steps)]
    (folder/kind/"log"/"metrics.csv").write_text("\n".join(lines) + "\n")
    for k in range(samples): Image.new("RGB", (64, 32), (40*k, 90, 120)).save(folder/kind/f"samples-{40*(k + 1):06d}.png")
    save_json(folder/kind/"done.json", dict(steps=120))


@pytest.fixture
def whole(tmp_path):
    "A chain of two stages with a model, scores and a note of its start."
    folder = tmp_path/"whole"
    for kind in ("teacher", "arm"): stage(folder, kind)
    note_start(folder, ["arm", "train", "all", "--quick", "--steps", "120", "--batch", "8", "--out", "runs/my run"], dict(quick=True, steps=120, batch=8, seed=7))
    model(folder/"model", {"shapes/t2i/strict/t1": .5, "shapes/t2i/strict/t1/counting": .25})
    return folder


def model(folder: Path, values: dict, **card):
    save_json(folder/"config.json", dict(format=1, arm={}, tokenizer={}, card=dict(name="x", command="arm train all", **card)))
    save_json(folder/"scores.json", {k: dict(value=v, low=max(0, v - .02), high=v + .02, n=100) for k, v in values.items()})
    return folder


def test_tells_command_seed_versions_curves_samples_and_scores(whole, tmp_path):
    out = write_run_report([whole], tmp_path/"report.html")
    text = out.read_text()
    page = checked(text)
    assert "arm train all --quick --steps 120 --batch 8 --out 'runs/my run'" in page.text and "seed 7" in page.text
    assert re.search(r"versions python \d[\d.]+.*, torch \d", page.text) and "Made with" in page.text
    assert text.count('class="line r0"') >= 5 and text.count('class="band"') >= 5, "teacher and transformer have five numbers, each with its band"
    assert page.text.count("normal: ") >= 5 and "step 40" in page.text and "step 120" in page.text
    assert sum(a.startswith("data:") for a in page.addresses) == 6
    assert "0.250" in page.text and "shapes/t2i: 2 scores" in page.text
    assert "Everything that was found could be read" in page.text and "has the same settings" in page.text


def test_two_runs_stand_side_by_side(whole, tmp_path):
    other = tmp_path/"other"
    stage(other, "arm", 3.)
    page = checked(write_run_report([whole, other], tmp_path/"report.html").read_text())
    text = (tmp_path/"report.html").read_text()
    assert f"Report of {whole} and {other}" in page.text and 'class="line r0"' in text and 'class="line r1"' in text
    assert "higher than the band since step" in page.text and "normal: " in page.text
    assert "not recorded of this run: worlds, batch" in page.text, "nothing tells the settings of the other run"
    assert page.tags.count("td") and text.count("<th><span class=\"key r1\">") == 1


def test_missing_parts_are_said(tmp_path):
    for name, make in {"log": lambda f: stage(f, "arm", samples=0), "model": lambda f: model(f/"model", {})}.items():
        make(tmp_path/name)
        page = checked(write_run_report([tmp_path/name], tmp_path/"report.html").read_text())
        assert ("No sheet of samples" in page.text and "not recorded" in page.text) if name == "log" else "No stage" in page.text
        assert "No scores" in page.text and "No reinforcement learning" in page.text


BROKEN = {  # what metrics.csv holds: what the page says
    "binary": (bytes(range(256))*50, "could not be read|no column"), "empty": (b"", "no column"), "header": (b"epoch,step,loss\n", "No curve"),
    "torn": (b"epoch,step,loss\n0,9,4.0\n0,19,3.0\n0,29", "1 of 3 lines could not be read"), "words": (b"epoch,step,loss\n0,nine,4.0\n0,19,3.0\n", "1 of 2 lines"),
    "nan": (b"step,loss\n1,nan\n2,inf\n3,-inf\n4,1.0\n", "3 values are not finite and left out"), "huge": (b"step,loss\n1,1e308\n2,-1e308\n3,1e-320\n4,0\n", "too few"),
    "step": (b"step,loss\n1e400,1\n-5,1\n99999999999999999999,2\n", "3 of 3 lines"), "nul": (b"step,loss\n1,\x002\n2,3\n", "1 of 2 lines"),
    "quotes": (b'step,loss\n"1,2\n3,4\n', "lines could not be read"), "wide": (b"step,loss\n1,2,3,4,5\n2,1\n", "1 of 2 lines"), "long": (b"step," + b"x"*200_000 + b"\n1,2\n", "cannot be read")}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_logs_become_words(name, tmp_path):
    data, says = BROKEN[name]
    (tmp_path/"r"/"arm"/"log").mkdir(parents=True)
    (tmp_path/"r"/"arm"/"log"/"metrics.csv").write_bytes(data)
    save_json(tmp_path/"r"/"arm"/"done.json", dict(steps=9))
    assert re.search(says, checked(run_report([read_run(tmp_path/"r")], REFERENCES)).text)


@pytest.mark.parametrize("file", ["scores.json", "model/scores.json", "model/config.json", "arm/done.json", "run.json"])
@pytest.mark.parametrize("data", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe\x00", b'{"a": NaN, "starts": 3, "card": 4, "arm": 1, "steps": "many"}', b"["*200_000,
                                  b'{"starts": [1, {"command": "arm", "settings": [], "versions": 3}], "card": {"run": 7, "rl": [3, {"phase": [], "run": []}], "command": {}}, "arm": {}, "steps": -1}'])
def test_damaged_json_becomes_words(file, data, whole):
    (whole/file).write_bytes(data)
    page = checked(run_report([read_run(whole)], REFERENCES))
    assert "normal: " in page.text


def test_hostile_strings_stay_text(tmp_path):
    folder = tmp_path/"<b onclick=x>&amp;"
    (folder/"arm"/"log").mkdir(parents=True)
    quoted = EVIL.replace('"', '""')
    (folder/"arm"/"log"/"metrics.csv").write_text(f'step,loss,"{quoted}"\n1,2,3\n2,1,4\n')
    model(folder/"model", {f"{EVIL}/a/b": .5, EVIL: .2}, run={EVIL: EVIL, "worlds": [EVIL]}, rl=[dict(phase=EVIL, start="../../.." + EVIL, run={EVIL: 1})])
    save_json(folder/"bench.json", dict(name=EVIL, values={EVIL: 1.}, intervals={EVIL: [EVIL]}))
    note_start(folder, ["arm", EVIL], {EVIL: EVIL})
    (folder/"arm"/"samples-000001.png").write_text(EVIL)
    text = run_report([read_run(folder)], REFERENCES)
    page = checked(text)
    assert EVIL not in text and "alert('x')" in page.text and "is no picture" in page.text


def test_pictures_that_fill_the_memory_are_not_opened(tmp_path):
    stage(tmp_path/"r", "arm", samples=1)
    (tmp_path/"r"/"arm"/"samples-000080.png").write_bytes(png(30_000, 30_000, 1, 0))
    page = checked(run_report([read_run(tmp_path/"r")], REFERENCES))
    assert "30000x30000 px and is not shown" in page.text or "is no picture that can be shown" in page.text


def test_before_and_after_rewards(tmp_path):
    model(tmp_path/"start", {"shapes/t2i/strict/t1": .5, "shapes/qa/exact": .85, "shapes/caption/exact": .93})
    model(tmp_path/"after", {"shapes/t2i/strict/t1": .8, "shapes/qa/exact": .85, "shapes/caption/exact": .8}, rl=[dict(phase="joint", start="start", run=dict(steps=480, seed=3))])
    page = checked(run_report([read_run(tmp_path/"after")], REFERENCES))
    assert "before: start" in page.text and "+0.300 better" in page.text and "+0.000 within the intervals" in page.text and "-0.130 worse" in page.text and "seed 3" in page.text


def test_a_start_is_found_in_the_folders_that_trainings_leave(tmp_path):
    model(tmp_path/"sft"/"model", {"shapes/t2i/strict/t1": .5})
    model(tmp_path/"rl"/"model", {"shapes/t2i/strict/t1": .8}, rl=[dict(phase="joint", start="sft", run=dict(steps=480, seed=3))])
    for runs in ([tmp_path/"rl"], [tmp_path/"sft", tmp_path/"rl"]):
        page = checked(run_report([read_run(r) for r in runs], REFERENCES))
        assert "+0.300 better" in page.text


def test_phases_of_a_recipe_stand_in_their_order(tmp_path):
    for k, phase in enumerate(("t2i", "edit", "joint")): model(tmp_path/phase/"model", {"shapes/t2i/strict/t1": .5 + .1 * k}, rl=[dict(phase=p, start="tiny", run={}) for p in ("t2i", "edit", "joint")[:k + 1]])
    run = read_run(tmp_path)
    assert [m.name for m in run.models] == ["t2i/model", "edit/model", "joint/model"] and run.scores["shapes/t2i/strict/t1"][0] == .7


def test_shipped_models_are_compared(tmp_path):
    page = checked(write_run_report([ROOT/"data"/"models"/"tiny", ROOT/"data"/"models"/"tiny-rl"], tmp_path/"r.html").read_text())
    assert "arm train grpo --out runs/rl --model runs/tiny/model" in page.text and "better" in page.text and "shapes/qa" in page.text


def test_links_that_turn_in_a_circle_are_not_followed(whole):
    os.symlink(whole, whole/"again")
    assert [s.name for s in read_run(whole).stages] == ["teacher", "arm"]


def test_a_whole_log_is_read_as_training_reads_it(whole):
    from arm.train.meanwhile import read_log
    assert read_curves(whole/"teacher") == (read_log(whole/"teacher"), [])


# ---- the command --------------------------------------------------------------------------------------------------------------

def test_the_command_writes_one_file(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said, err = run("report", whole, "-o", "out/report.html")
    assert (code, err) == (0, "") and "out/report.html" in said and os.listdir("out") == ["report.html"]
    checked(Path("out/report.html").read_text())


@pytest.mark.parametrize("argv, says", [(["nowhere"], "no folder"), (["empty"], "no run"), (["whole", "empty"], "no run"), (["whole", "-o", "report.png"], "no web page"), (["whole"]*8, "1 to 7"), ([], "RUN"), (["whole", "-o", "empty"], "folder")])
def test_refusals_are_one_line_and_leave_what_was_there(argv, says, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"empty").mkdir()
    (tmp_path/"report.html").write_text("old")
    assert says in refusal(*run("report", *argv))
    assert (tmp_path/"report.html").read_text() == "old" and sorted(os.listdir(tmp_path)) == ["empty", "report.html", "whole"]


def test_a_training_notes_its_start_and_a_refused_one_does_not(tmp_path, monkeypatch):
    from arm.rl import recipe
    seen = []
    monkeypatch.setattr(recipe, "train_grpo", lambda out="runs/grpo", steps=480, seed=0: seen.append(read_run_json(out)))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "grpo", "--out", "runs/a b", "--steps", "3"]) == 0
    (start,) = seen[0]["starts"]
    assert start["command"] == ["arm", "train", "grpo", "--out", "runs/a b", "--steps", "3"] and start["settings"] == dict(out="runs/a b", steps=3, seed=0) and "torch" in start["versions"]
    assert main(["train", "arm", "--out", "nothing"]) == 2 and not (tmp_path/"nothing").exists()


def read_run_json(out): return json.loads((Path(out)/"run.json").read_text())
