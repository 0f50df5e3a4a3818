"""Benchmarks as their users run them: several processes at once, a killed one, odd files, and official numbers from the shipped samples."""
import json
import signal
import subprocess
import sys

import pytest
from tools.repo import ROOT

from arm.app.score import score, self_tests
from arm.eval.bench import BENCH

RUN = """
import sys, time
from pathlib import Path
from PIL import Image
from arm.eval.draw import generate
from arm.eval.geneval import LAYOUT, read_prompts
from arm.eval.bench import BENCH
rank, world, wait = int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
def make(items, seeds):
    print("draws", flush=True); time.sleep(wait)
    return [Image.new("RGB", (16, 16), (s % 256, s // 256 % 256, s // 65536 % 256)) for s in seeds]
print(generate(read_prompts(BENCH/"geneval/evaluation_metadata.jsonl"), make, LAYOUT, sys.argv[1], rank=rank, world=world, batch=4))
"""


def start(folder, rank=0, world=1, wait=0.):
    return subprocess.Popen([sys.executable, "-c", RUN, str(folder), str(rank), str(world), str(wait)], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def content(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in (folder/"images").rglob("*.*")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder).wait(300) == 0
    return content(folder)


def test_two_processes_fill_one_folder_as_one_would(tmp_path, whole):
    both = [start(tmp_path, r, 2) for r in range(2)]
    assert [p.wait(300) for p in both] == [0, 0]
    assert content(tmp_path) == whole and len(whole) == 6 * 5


def test_a_killed_run_leaves_whole_files_and_goes_on(tmp_path, whole):
    first = start(tmp_path, wait=.2)
    for _ in range(3): assert first.stdout.readline()
    first.send_signal(signal.SIGKILL); first.wait()
    part = content(tmp_path)
    assert 0 < len(part) < len(whole) and all(whole[k] == v for k, v in part.items())
    assert start(tmp_path).wait(300) == 0
    assert content(tmp_path) == whole


def test_every_shipped_reference_has_its_known_score():
    assert self_tests() == {"geneval": ("overall", 3.5/6), "dpg": ("dpg", 59.375), "wise": ("wiscore/culture", pytest.approx(.95)), "gedit": ("en/G_O", pytest.approx(64/11))}


@pytest.mark.parametrize("name,paths", [("geneval", ["geneval/results.jsonl"]), ("dpg", ["dpg/dpg_bench.csv", "dpg/results_detail.txt"]),
                                        ("wise", ["wise/verified_scores_results.jsonl"]), ("gedit", ["gedit/scores"])])
def test_json_is_strict_and_repeats(name, paths):
    files = [BENCH/p for p in paths]
    got = score(name, *files, json=True)
    assert got == score(name, *files, json=True) and json.loads(got, parse_constant=lambda c: pytest.fail(c))["name"] == name


@pytest.mark.parametrize("name", ["geneval", "dpg", "wise", "gedit"])
@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", b"[]", b"{}\n", b"null\n", b'{"prompt_id": 1}\n', b"a,b\n1,2\n"])
def test_odd_files_end_in_one_sentence(name, data, tmp_path):
    for suffix in (".jsonl", ".csv", ".txt", "_color_alter_gpt_score.csv"):
        file = tmp_path/f"x{suffix}"
        file.write_bytes(data)
        with pytest.raises(ValueError) as e: score(name, file)
        assert type(e.value) is ValueError and "\n" not in str(e.value)  # in our words, not in those of a library


def test_scoring_needs_no_model():
    code = "import sys, arm.app.score; print(*sorted(m for m in sys.modules if m.startswith(('lightning', 'transformers', 'matplotlib', 'diffusers'))))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip() == ""



def test_a_benchmark_is_put_to_a_model_from_the_command_line(tmp_path, capsys):
    from arm.app.cli import main
    from PIL import Image
    data = BENCH/"pope"/"coco_pope_random.json"
    for name in {json.loads(line)["image"] for line in data.read_text().splitlines()}: Image.new("RGB", (32, 32), "white").save(tmp_path/name)
    args = ["eval", "pope", "--data", str(data), "--images", str(tmp_path), "--out", str(tmp_path/"run"), "--json", str(tmp_path/"pope.json")]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "pope" in out and "answers: " in out and json.loads((tmp_path/"pope.json").read_text())["name"] == "pope"
    assert main(args) == 0  # a finished run is only read
    for wrong, why in ((["eval", "pope"], "--data"), (["eval", "pope", "--data", str(data)], "--images"), (["eval", "imagenet", "--data", str(data)], "choose one of"),
                       (["eval", "pope", "--data", str(tmp_path/"no.json"), "--images", str(tmp_path)], "no.json")):
        assert main(wrong) == 2
        assert why in capsys.readouterr().err
