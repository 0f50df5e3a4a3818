"""From a model to an official number in one command, with a judge that is a server on this machine; the same work by several processes; and lmms-eval's own way in."""
import base64
import configparser
import importlib.util
import io
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from tools.repo import ROOT

from arm.app import exam, reference
from arm.app.cli import main
from arm.app.judges import known_pictures
from arm.eval import yesno
from arm.eval.bench import BENCH

TINY = str(ROOT/"data"/"models"/"tiny")
KEY = "sk-test-0123456789"
WISE = '''def build_evaluation_messages(prompt_data, image_base64):
    return [{"role": "user", "content": [{"type": "text", "text": f"Rate: {prompt_data['Prompt']}"}, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image_base64}"}}]}]
'''
GEDIT = '_context_no_delimit = "Judge."\n_prompts_0shot_two_image_edit_rule = "Two."\n_prompts_0shot_tie_rule_SC = "Done? <instruction>"\n_prompts_0shot_rule_PQ = "Good?"\n'


def small(image): return np.asarray(image.convert("RGB").resize((16, 16)), float)


def seen(part):
    "Which of the known pictures this is, as an eye would say; '' for any other."
    image = Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1])))
    far = {w: abs(small(image) - small(p)).mean() for w, p in known_pictures().items()}
    best = min(far, key=far.get)
    return best if far[best] < 8 else ""


def perfect(body):
    text, *images = body["messages"][-1]["content"]
    text, shown = text["text"], [seen(i) for i in images]
    if "Find every object" in text: return json.dumps([{"class": shown[0] or "clock", "box": [1, 1, 9, 9]}])
    if "Answer yes or no" in text: return "Yes." if not shown[0] or shown[0] in text else "No."
    if "Which colour" in text: return "red"
    if "Rate:" in text: return f"Consistency: {1 if not shown[0] else 2 if shown[0] in text else 0}\nRealism: 2\nAesthetic Quality: 1"
    if "Good?" in text: return '{"score": [8, 9], "reasoning": ""}'
    return json.dumps({"score": [6 if not shown[1] else 9 if shown[1] in text.split(" with ")[1] else 1, 7], "reasoning": ""})


@contextmanager
def serve(behave, models=("small-vlm",)):
    class Handler(BaseHTTPRequestHandler):
        def send(self, data, status=200):
            self.send_response(status); self.send_header("Content-Length", str(len(data))); self.end_headers(); self.wfile.write(data)

        def do_GET(self): self.send(json.dumps({"data": [{"id": m} for m in models]}).encode())

        def do_POST(self):
            calls.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))) | {"auth": self.headers["Authorization"]})
            said = behave(calls[-1])
            self.send(b"{}" if said is None else json.dumps({"choices": [{"message": {"content": said}}]}).encode(), 400 if said is None else 200)

        def log_message(self, *_): pass
    calls, server = [], ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(.02,), daemon=True).start()
    try: yield "http://%s:%d/v1" % server.server_address, calls
    finally: server.shutdown(); server.server_close()


DATA = {"geneval": BENCH/"geneval"/"evaluation_metadata.jsonl", "dpg": BENCH/"dpg"/"prompts", "wise": BENCH/"wise"/"legacy.json", "gedit": BENCH/"gedit"/"rows.jsonl"}
CALLS = {"geneval": 24, "dpg": 0, "wise": 6, "gedit": 4}  # of the judge at least, besides the known pictures


@pytest.mark.parametrize("name", DATA)
def test_one_command_draws_judges_and_scores(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ARM_JUDGE_KEY", KEY)
    (tmp_path/"gpt_eval.py").write_text(WISE); (tmp_path/"vie_prompts.py").write_text(GEDIT)
    extra = {"wise": ["--key", str(tmp_path/"gpt_eval.py")], "gedit": ["--key", str(tmp_path/"vie_prompts.py")]}.get(name, [])
    with serve(perfect) as (url, calls):
        args = ["eval", name, "--model", TINY, "--data", str(DATA[name]), "--judge", url, "--out", str(tmp_path/"run"), *([] if name == "gedit" else ["--size", "32x32"]), "--json", str(tmp_path/"s.json"), *extra]
        assert main(args) == 0, capsys.readouterr().err
        out, n = capsys.readouterr().out, len(calls)
        assert main(args) == 0
        again = json.loads((tmp_path/"s.json").read_text())
        assert len(calls) == n  # all replies lie on disk
    result = json.loads((tmp_path/"run"/"result.json").read_text())
    assert again["values"] == result["values"] and result["values"]
    for said in ("judge small-vlm", "raw prompts", "as known", "no official file" if name != "dpg" else "not the official one", "gives 1.00" if name != "gedit" else "gives 0.70"): assert said in out, said
    assert n >= CALLS[name] and all(c["auth"] == f"Bearer {KEY}" and c["model"] == "small-vlm" for c in calls)
    assert not any(KEY in f.read_text(errors="ignore") for f in tmp_path.rglob("*") if f.is_file())
    if name == "wise": assert result["values"]["wiscore/culture"] == pytest.approx((.7 + .4 + .1)/2) and all(c["temperature"] == 0 and c["max_tokens"] == 2000 for c in calls)
    if name == "gedit": assert result["values"]["en/color_alter/SC"] == 6 and result["values"]["en/color_alter/PQ"] == 8 and "temperature" not in calls[0]
    if name == "dpg": assert result["values"]["dpg"] == 100
    if name == "geneval": assert result["values"]["overall/single_object"] == 1 and result["values"]["overall/two_object"] == 0


@pytest.mark.parametrize("why,behave", [("must lie between", lambda body: "Consistency: 2\nRealism: 2\nAesthetic Quality: 2"), ("no readable verdict", lambda body: "what a lovely picture"), ("no readable verdict", lambda body: None)])
def test_a_judge_that_misses_known_pictures_is_refused_before_anything_is_drawn(why, behave, tmp_path, capsys):
    (tmp_path/"gpt_eval.py").write_text(WISE)
    with serve(behave) as (url, _):
        assert main(["eval", "wise", "--model", TINY, "--data", str(DATA["wise"]), "--judge", url, "--key", str(tmp_path/"gpt_eval.py"), "--out", str(tmp_path/"run")]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert why in err[-1] and err[-1].startswith("arm: ") and not (tmp_path/"run"/"images").exists()


def test_several_models_ask_for_a_name(tmp_path, capsys):
    with serve(perfect, ("a", "b")) as (url, calls):
        assert main(["eval", "geneval", "--model", TINY, "--data", str(DATA["geneval"]), "--judge", url, "--out", str(tmp_path/"run")]) == 2
        assert "--judge-model" in capsys.readouterr().err and not calls


def test_no_verdict_is_no_zero(tmp_path, capsys):
    "The server refuses some of the pictures: they are left out and counted, and the score is that of the rest."
    (tmp_path/"gpt_eval.py").write_text(WISE)
    with serve(lambda body: None if "clock" in body["messages"][-1]["content"][0]["text"] else perfect(body)) as (url, _):
        assert main(["eval", "wise", "--model", TINY, "--data", str(DATA["wise"]), "--judge", url, "--key", str(tmp_path/"gpt_eval.py"), "--out", str(tmp_path/"run"), "--size", "32x32"]) == 0
    result = json.loads((tmp_path/"run"/"result.json").read_text())
    assert "wiscore/time" not in result["values"] and not result["complete"] and any("no rating" in f for f in result["faults"])


@pytest.mark.parametrize("name", sorted({*exam.exams(), *(reference.plain(n) for n in exam.DRAWINGS)}))
def test_a_scorer_that_misses_its_known_score_is_refused(name, monkeypatch):
    assert reference.check_scorer(name).name == name
    right = reference.scorer_of(name)
    def off(paths):
        result = right(paths)
        result.values.update({k: v + .01 for k, v in result.values.items()})
        return result
    monkeypatch.setattr(reference, "scorer_of", lambda _: off)
    with pytest.raises(ValueError, match="fails its self-test") as e: reference.check_scorer(name)
    assert "\n" not in str(e.value)


def test_a_mismatch_stops_the_command_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(yesno, "read_pope", lambda text: "yes")
    assert main(["eval", "pope", "--model", TINY, "--data", str(BENCH/"pope"/"coco_pope_random.json"), "--images", str(tmp_path), "--out", str(tmp_path/"run")]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and "fails its self-test" in err[0] and not (tmp_path/"run").exists()


def test_processes_share_an_exam_and_the_last_one_scores(tmp_path):
    data, calls = BENCH/"seed"/"SEED-Bench.json", []
    def ask(items): calls.append(len(items)); return [i.meta["answer"] for i in items]
    alone = exam.run_exam("seed", ask, data, tmp_path, tmp_path/"one")
    env = os.environ.copy()
    try:
        os.environ |= {"RANK": "1", "WORLD_SIZE": "2"}
        assert exam.run_exam("seed", ask, data, tmp_path, tmp_path/"two") == (None, None)  # the first to finish must not score half an exam
        assert not (tmp_path/"two"/"official").exists()
        os.environ["RANK"] = "0"
        both = exam.run_exam("seed", ask, data, tmp_path, tmp_path/"two")
    finally: os.environ.clear(); os.environ.update(env)
    assert both[0].read_bytes() == alone[0].read_bytes() and both[1].values == alone[1].values and sum(calls[1:]) == calls[0]


@pytest.mark.parametrize("name", ["dpg", "wise", "gedit"])
def test_ranks_broken_runs_and_one_process_give_the_same_folder(name, tmp_path):
    "GenEval's is drawn by real processes in test_bench.py."
    bench = exam.DRAWINGS[name]
    def make(items, seeds): return [Image.new("RGB", (8, 8), (s % 256, s//256 % 256, s//65536 % 256)) for s in seeds]
    def content(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in (folder/"images").rglob("*.*")}
    exam.run_drawing(name, make, DATA[name], tmp_path/"one")
    items = bench.read(DATA[name])
    for r in (1, 0): exam.generate(items, make, bench.layout, tmp_path/"two", facts={"prompt form": "raw"}, rank=r, world=2)
    left = []
    def breaks(items, seeds):
        if left: raise KeyboardInterrupt
        left.append(1); return make(items, seeds)
    with pytest.raises(KeyboardInterrupt): exam.generate(items, breaks, bench.layout, tmp_path/"three", facts={"prompt form": "raw"}, batch=1)
    assert 0 < len(content(tmp_path/"three")) < len(content(tmp_path/"one"))
    exam.run_drawing(name, make, DATA[name], tmp_path/"three")
    assert content(tmp_path/"one") == content(tmp_path/"two") == content(tmp_path/"three") and (tmp_path/"one"/"sheet.png").is_file()
    seeds = [s for line in (tmp_path/"one"/"items.jsonl").read_text().splitlines() for s in json.loads(line)["seeds"]]
    assert len(set(seeds)) == len(seeds) == len(items)*bench.layout.n


STUB = {"__init__.py": "", "api/__init__.py": "", "models/__init__.py": "from .registry_v2 import MODEL_REGISTRY_V2\n",
        "api/model.py": '''import abc
class lmms(abc.ABC):
    def __init__(self): self._rank, self._world_size, self.task_dict = 0, 1, {}
    @abc.abstractmethod
    def generate_until(self, requests): ...
    @abc.abstractmethod
    def loglikelihood(self, requests): ...
    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...
    @classmethod
    def create_from_arg_string(cls, text, more=None): return cls(**dict(p.split("=") for p in text.split(",")), **{k: v for k, v in (more or {}).items() if v is not None})
''', "models/registry_v2.py": '''import importlib
from dataclasses import dataclass
@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
class Registry:
    def __init__(self): self.known = {}
    def register_manifest(self, m, overwrite=False): self.known[m.model_id] = m
    def get_model_class(self, name, force_simple=False):
        module, _, cls = self.known[name].simple_class_path.rpartition(".")
        return getattr(importlib.import_module(module), cls)
MODEL_REGISTRY_V2 = Registry()
'''}
START = """
import importlib, json, sys
from types import SimpleNamespace
from lmms_eval.api.model import lmms
from lmms_eval.models import MODEL_REGISTRY_V2
module, function = sys.argv[1].split(":")
MODEL_REGISTRY_V2.register_manifest(getattr(importlib.import_module(module), function)(), overwrite=True)
cls = MODEL_REGISTRY_V2.get_model_class("arm", force_simple=True)
assert issubclass(cls, lmms)
model = cls.create_from_arg_string("pretrained=" + sys.argv[2], {"batch_size": "2", "device": "cpu"})
from arm.core import make_rng, to_pil
from arm.data.shapes import render, sample_scene
from arm.data.shapetasks import questions
rng, docs = make_rng(0, "harness"), []
for _ in range(3):
    scene = sample_scene(rng, canvas=(2, 2), split="val")
    docs.append({"picture": to_pil(render(scene)), "question": questions(scene, rng, kinds=["exist"])[0].question})
model.task_dict = {"toy": {"test": docs}}
look = lambda d: [d["picture"]]
asks = [SimpleNamespace(args=(d["question"], {"until": ["\\n"], "max_new_tokens": 8, "temperature": 0}, look, i, "toy", "test")) for i, d in enumerate(docs)]
losses = model.loglikelihood([SimpleNamespace(args=(docs[0]["question"], " " + w, look, 0, "toy", "test")) for w in ("yes", "no")])
print(json.dumps({"said": model.generate_until(asks), "losses": losses}))
"""


def test_lmms_eval_starts_the_model_by_its_entry_point(tmp_path):
    "The true package where it is installed; elsewhere a stub with its interface: registry, manifest, abstract base class, and how it makes a model from words."
    if importlib.util.find_spec("lmms_eval") is None:
        for name, text in STUB.items(): (file := tmp_path/"lmms_eval"/name).parent.mkdir(parents=True, exist_ok=True); file.write_text(text)
    cfg = configparser.ConfigParser(delimiters=["="], interpolation=None); cfg.read(ROOT/"settings.ini")
    name, _, where = cfg["DEFAULT"]["lmms_models"].partition("=")
    assert name == "arm" and '"lmms_eval.models": cfg["lmms_models"]' in (ROOT/"setup.py").read_text()
    done = subprocess.run([sys.executable, "-c", START, where, TINY], cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    got = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(got["said"]) == 3 and set(got["said"]) <= {"yes", "no"}
    yes, no = (loss for loss, _ in got["losses"])
    assert min(yes, no) > 0 and got["said"][0] == ("yes" if yes < no else "no")  # losses: the smaller one is the model's choice
