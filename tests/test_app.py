"""The browser demo as strangers use it: first the real server by its own client and by plain HTTP, then every tab in a headless browser."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from PIL import Image
from tools.repo import ROOT
from tools.strangers import encoded, png, png16, refusal, run, scene, untrained

from arm.app import app as demo
from arm.app.studio import Examples, examples
from arm.app.terminal import MODEL, load_model
from arm.core import to_float
from arm.data import pictures
from arm.model.generate import Decoder

ARM = Path(sys.executable).parent/"arm"
RIGHT = scene()  # 48 px wide, 32 px high
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of libraries that Gradio calls
META = dict(_type="gradio.FileData")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("app")


@pytest.fixture(scope="module")
def model(folder): return untrained(folder/"model")


@pytest.fixture(scope="module")
def arm(model): return load_model(model)


@pytest.fixture(scope="module")
def url(arm):
    app = demo.build_app(arm, Examples(["a cat"], [], [], []))
    yield demo.serve(app, port=free_port())
    app.close(verbose=False)


@pytest.fixture(scope="module")
def visitor(url, folder): return Client(url, verbose=False, download_files=folder)


@pytest.fixture
def fed(monkeypatch):
    "A model that takes its time; the moments at which it was fed a token, and how many visitors it served at once."
    moments, inside, feed = [], [], Decoder.feed
    def slow(self, *args):
        inside.append(1)
        moments.append((time.monotonic(), len(inside)))
        time.sleep(.04)
        try: return feed(self, *args)
        finally: inside.pop()
    monkeypatch.setattr(Decoder, "feed", slow)
    return moments


def wish(text="a cat", size="48x48", n=1, seed=0, temperature=1, scale=1, plan=True): return [text, size, n, seed, temperature, scale, plan]


def drawn(gallery) -> list[Image.Image]:
    return [Image.open(item["image"]).convert("RGB") for item in (gallery["value"] if isinstance(gallery, dict) else gallery)]


def until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(.02)


def post(url, name, *data, session="raw"):
    "A request by plain HTTP, as a script would send it; the last event of its answer."
    fn = next(k["id"] for k in httpx.get(f"{url}config").json()["dependencies"] if k["api_name"] == name)
    asked = httpx.post(f"{url}gradio_api/queue/join", json=dict(data=list(data), fn_index=fn, session_hash=session))
    if asked.status_code != 200: return asked
    with httpx.stream("GET", f"{url}gradio_api/queue/data", params=dict(session_hash=session), timeout=60) as events:
        for line in events.iter_lines():
            if line.startswith("data:") and (event := json.loads(line[5:]))["msg"] in ("process_completed", "unexpected_error"): return event


def upload(url, name, data): return httpx.post(f"{url}gradio_api/upload", files={"files": (name, data)})


def alive(visitor): assert visitor.predict(*wish(size="32x32"), api_name="/imagine")[3].startswith("done")


# ---- each tab -----------------------------------------------------------------------------------------------------------------

def test_the_same_seed_gives_the_picture_of_the_command_line(visitor, model, tmp_path):
    job = visitor.submit(*wish(size="32x48", n=2, seed=7, scale=2), api_name="/imagine")
    gallery, _, _, note = job.result()
    assert run("imagine", "a cat", "--size", "32x48", "--n", 2, "--seed", 7, "--cfg-scale", 2, "--model", model, "-o", tmp_path/"out.png")[0] == 0
    assert [p.tobytes() for p in drawn(gallery)] == [Image.open(tmp_path/f"out-{k}.png").convert("RGB").tobytes() for k in (1, 2)]
    assert note == "done: 24 tokens, 48 bytes"


def test_a_picture_grows(visitor, fed):
    views = list(visitor.submit(*wish(), api_name="/imagine"))
    grey = [sum(n for n, c in drawn(v[0])[0].getcolors(99999) if c == (204, 204, 204)) for v in views]
    assert len(views) > 3 and grey == sorted(grey, reverse=True) and grey[0] > 1000 and grey[-1] < 64
    counts = [int(v[3].split(" of 36")[0]) for v in views[:-1]]
    assert counts == sorted(set(counts))


def test_edit_ask_and_reconstruct_do_what_the_command_line_does(visitor, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RIGHT.save("in.png")
    sent = handle_file("in.png")
    edited = visitor.predict(sent, "make it red", 1, 3, .5, 1.5, 2, True, api_name="/edit")
    assert run("edit", "in.png", "make it red", "--seed", 3, "--temperature", .5, "--text-scale", 1.5, "--image-scale", 2, "--model", model, "-o", "a.png")[0] == 0
    assert drawn(edited[0])[0].tobytes() == Image.open("a.png").tobytes()
    assert visitor.predict(sent, "what is it?", api_name="/ask")[0] == run("ask", "in.png", "what is it?", "--model", model)[1][:-1]
    _, back, _, note = visitor.predict(sent, api_name="/reconstruct")
    code, said, _ = run("reconstruct", "in.png", "--model", model, "-o", "b.png")
    assert code == 0 and Image.open(back).convert("RGB").tobytes() == Image.open("b.png").tobytes() and note in said


def test_the_microscope_shows_the_last_request_of_its_own_visitor(url, visitor):
    visitor.predict(*wish("<b>${7*7}</b> {{x}}", size="32x32", n=2), api_name="/imagine")
    seen = visitor.predict(2, api_name="/microscope")
    assert seen.count("<svg") == 2 and "bits of surprise for 16 patches" in seen and "entropy of each patch" in seen
    assert "<b>" not in seen and "$" not in seen and "{" not in seen and "49" not in re.findall(r">([^<>]{1,6})</text>", seen)[:12]
    with pytest.raises(Exception, match="from 1 to 2"): visitor.predict(3, api_name="/microscope")
    assert Client(url, verbose=False).predict(1, api_name="/microscope") == demo.FIRST


# ---- files from strangers -----------------------------------------------------------------------------------------------------

FOUR = RIGHT.quantize(16, dither=Image.Dither.NONE)
KINDS = {"animated.gif": encoded(FOUR, "GIF", save_all=True, append_images=[Image.new("L", RIGHT.size)]*3), "inks.jpg": encoded(RIGHT.convert("CMYK"), "JPEG"), "inks.tiff": encoded(RIGHT.convert("CMYK"), "TIFF"),
         "16bit-grey.png": encoded(Image.fromarray(np.asarray(RIGHT.convert("L")).astype(np.uint16)*257), "PNG"), "16bit-rgb.png": png16(np.asarray(RIGHT).astype(np.uint16)*257), "wrong.svg": encoded(RIGHT, "PNG")}
HOSTILE = {"bomb.png": (png(20_000, 20_000, 1, 0), "pixels"), "understated.png": (png(2**31 - 1, 1, 1, 0, b""), "pixels"), "cut.jpg": (encoded(RIGHT.resize((300, 300)), "JPEG")[:2000], "damaged"), "cut.png": (encoded(RIGHT, "PNG")[:200], "damaged"),
           "script.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "not a picture"), "letter.png": (b"Dear model,\n", "not a picture"), "empty.png": (b"", "not a picture"), "page.html": (b"<script>alert(1)</script>", "not a picture"),
           "zip.png": (b"PK\x03\x04" + bytes(200), "not a picture"), "zeros.jpg": (bytes(5000), "not a picture")}


def sent(url, name, data):
    path = upload(url, name, data).json()[0]
    return dict(path=path, orig_name=name, meta=META)


@pytest.fixture
def readers(monkeypatch):
    "Who opened a picture, while the server worked."
    seen, opened = [], Image.open
    def watched(*args, **kwargs):
        seen.append(sys._getframe(1).f_globals["__name__"])
        return opened(*args, **kwargs)
    monkeypatch.setattr(Image, "open", watched)
    return seen


@pytest.mark.parametrize("name", KINDS)
def test_reads_every_kind_of_picture_by_our_own_reader(name, url, arm, readers):
    event = post(url, "reconstruct", sent(url, name, KINDS[name]))
    assert event["success"], event
    assert set(readers) == {pictures.__name__}
    seen = Image.open(event["output"]["data"][0]["path"]).convert("RGB")
    (folder := Path(event["output"]["data"][0]["path"]).parent/name).write_bytes(KINDS[name])
    assert seen.tobytes() == pictures.open_picture(folder).tobytes()


@pytest.mark.parametrize("name", HOSTILE)
def test_refuses_every_hostile_file_in_words(name, url, visitor, readers):
    data, says = HOSTILE[name]
    file = sent(url, name, data)
    for tab, more in (("reconstruct", []), ("ask", ["why?"]), ("edit", ["make it red", 1, 0, 0, 1, 1, True])):
        event = post(url, tab, file, *more)
        said = event["output"]["error"]
        assert not event["success"] and says in said and re.search("[;:]", said) and "Traceback" not in said and "/" not in said, event
    assert set(readers) <= {pictures.__name__}
    alive(visitor)


def test_refuses_files_and_requests_that_are_too_large(url, visitor):
    big = bytes(demo.MAX_UPLOAD + 2**17)
    assert upload(url, "big.png", big).status_code == 413
    assert upload(url, "big.png", bytes(demo.MAX_UPLOAD + 100)).status_code == 413, "within the door's limit, above that of a file"
    def slowly():
        for k in range(0, len(big), 2**20): yield big[k:k + 2**20]
    try: assert httpx.post(f"{url}gradio_api/upload", content=slowly(), headers={"content-type": "multipart/form-data; boundary=x"}).status_code >= 400
    except httpx.TransportError: pass  # hung up on
    assert httpx.post(f"{url}gradio_api/queue/join", json=dict(data=["x"*len(big)], fn_index=0, session_hash="a")).status_code == 413
    alive(visitor)


@pytest.mark.parametrize("name", ["../../../evil.png", "/etc/evil.png", "x"*300 + ".png", "плохое имя 🙂.png", "..", "a\\b.png", ".htaccess"])
def test_names_of_files_lead_nowhere(name, url, visitor):
    answer = upload(url, name, encoded(RIGHT, "PNG"))
    if answer.status_code == 200:
        path = Path(answer.json()[0])
        assert path.resolve().is_relative_to(Path(demo.need_gradio().utils.get_upload_folder()).resolve())
        assert post(url, "reconstruct", dict(path=str(path), orig_name=name, meta=META))["success"]
    alive(visitor)


@pytest.mark.parametrize("name", ["script.svg", "page.html"])
def test_a_script_is_kept_and_not_shown(name, url):
    path = upload(url, name, HOSTILE[name][0]).json()[0]
    answer = httpx.get(f"{url}gradio_api/file={path}")
    assert answer.status_code in (403, 404) or answer.headers["content-disposition"].startswith("attachment")


def test_opens_no_file_but_uploads_and_fetches_nothing(url, visitor, model):
    for file, says in ((dict(path=str(model/"config.json"), meta=META), None), (dict(path=str(model/"config.json")), None), (dict(path="../../etc/hostname", meta=META), None),
                       (dict(path="https://example.com/x.png", meta=META), "fetches nothing"), (dict(path=None, url="data:image/png;base64,AAAA", meta=META), "no picture"), (None, "no picture")):
        event = post(url, "reconstruct", file)
        assert not event["success"] and (says is None or says in event["output"]["error"]), event
    alive(visitor)


@pytest.mark.parametrize("change, says", [(dict(text=" "), "empty"), (dict(text="red "*400), "shorten"), (dict(text="円"*100_000), "shorten"), (dict(text=None), "empty"), (dict(text=7), "empty"), (dict(size="5x5"), "size"), (dict(size=None), "size"), (dict(size=[1]), "size"), (dict(n=10**6), "n '"),
                                          (dict(n=0), "n '"), (dict(n=None), "n '"), (dict(seed=-1), "seed"), (dict(seed="x"), "seed"), (dict(seed=1e99), "seed"), (dict(seed=[1]), "seed"), (dict(temperature="warm"), "temperature"), (dict(temperature=-1), "temperature"), (dict(temperature=1e-40), "greedy"),
                                          (dict(scale={}), "text_scale")])
def test_refuses_impossible_values_in_words(change, says, url):
    event = post(url, "imagine", *wish(**change))
    assert not event["success"] and says in event["output"]["error"] and "Traceback" not in event["output"]["error"], event


# ---- several visitors ---------------------------------------------------------------------------------------------------------

def test_two_visitors_at_once_get_what_each_would_get_alone(url, visitor, arm, folder, fed):
    jobs = [(who.submit(*wish(size="32x32", seed=seed), api_name="/imagine"), seed) for who, seed in ((visitor, 1), (Client(url, verbose=False, download_files=folder), 2))]
    pictures = [drawn(job.result()[0])[0].tobytes() for job, _ in jobs]
    assert pictures == [arm.imagine("a cat", (32, 32), 1, seed=seed)[0].tobytes() for _, seed in jobs]
    assert max(n for _, n in fed) == 1, "one visitor at a time"


def test_stop_stops_the_model(url, visitor, fed):
    job = visitor.submit(*wish(), api_name="/imagine")
    until(lambda: len(fed) >= 5)
    job.cancel()
    time.sleep(.6)
    then = len(fed)
    time.sleep(.6)
    assert len(fed) == then < 30
    alive(visitor)


def test_who_leaves_does_not_keep_the_others_waiting(url, visitor, fed):
    seen = []
    def leave():
        with httpx.Client(timeout=30) as web:
            fn = next(k["id"] for k in web.get(f"{url}config").json()["dependencies"] if k["api_name"] == "imagine")
            web.post(f"{url}gradio_api/queue/join", json=dict(data=wish(n=9), fn_index=fn, session_hash="leaver"))
            with web.stream("GET", f"{url}gradio_api/queue/data", params=dict(session_hash="leaver")) as events:
                for line in events.iter_lines():
                    if "process_generating" in line: return seen.append(1)
    leave()
    assert seen
    time.sleep(1.5)
    then = len(fed)
    time.sleep(.5)
    assert len(fed) == then < 30, "the model goes on for nobody"
    alive(visitor)


def test_a_full_queue_says_so_and_drains(arm, folder, fed, monkeypatch):
    monkeypatch.setattr(demo, "MAX_QUEUE", 2)
    app = demo.build_app(arm, Examples(["a cat"], [], [], []))
    try:
        url = demo.serve(app, port=free_port())
        visitors = [Client(url, verbose=False, download_files=folder) for _ in range(4)]
        jobs = [visitors[0].submit(*wish(), api_name="/imagine")]
        until(lambda: fed)
        for v in visitors[1:3]:
            jobs.append(v.submit(*wish(size="32x32"), api_name="/imagine"))
            until(lambda: len(app._queue) >= len(jobs) - 1)
        with pytest.raises(Exception, match="(?i)full"): visitors[3].predict(*wish(), api_name="/imagine")
        assert all(job.result()[3].startswith("done") for job in jobs)
        alive(visitors[3])
    finally: app.close(verbose=False)


# ---- the command --------------------------------------------------------------------------------------------------------------

def test_listens_to_this_machine_alone_and_calls_nobody(url):
    text = httpx.get(url).text
    assert httpx.URL(url).host == "127.0.0.1" and "fonts.g" not in text and httpx.get(url).headers["content-security-policy"] == demo.POLICY
    config = httpx.get(f"{url}config").json()
    assert config["analytics_enabled"] is False and os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    with socket.socket() as s:
        s.settimeout(2)
        other = next((a for a in socket.gethostbyname_ex(socket.gethostname())[2] if not a.startswith("127.")), None)
        if other: assert s.connect_ex((other, httpx.URL(url).port)) != 0


def test_another_address_is_a_choice_with_a_warning(model, capsys):
    seen = []
    demo.open_app(model, host="0.0.0.0", port=free_port(), say=seen.append, until=lambda: None)
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(err) == 1 and "0.0.0.0" in err[0] and "no password" in err[0]


def test_refusals_of_the_command(url, model, monkeypatch):
    assert "in use" in refusal(*run("app", "--model", model, "--port", httpx.URL(url).port))
    for argv in (["--port", "99999"], ["--port", "0"], ["--host", "no.such.host.invalid", "--port", "8000"], ["--share", "maybe"], ["--model", "nowhere"], ["--device", "toaster"], ["--seed", "-1"]): refusal(*run("app", *argv))
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert 'pip install "arm[app]"' in refusal(*run("app", "--model", model))


def test_the_command_serves_until_it_is_interrupted(model):
    port = free_port()
    child = subprocess.Popen([ARM, "app", "--model", model, "--port", str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # tests that a shell put into the background inherit a deaf ear
    late = threading.Timer(120, child.kill)
    late.start()
    try:
        lines = []
        while not lines or "open http" not in lines[-1]:
            lines.append(child.stdout.readline())
            assert lines[-1], child.stderr.read()
        assert httpx.get(re.search(r"http\S+", lines[-1])[0]).status_code == 200
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
        assert (child.returncode, err, out) == (130, "arm: interrupted\n", "")
    finally:
        late.cancel()
        child.kill()


# ---- in a browser -------------------------------------------------------------------------------------------------------------

SHOTS = ROOT/"runs"/"app"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"))), None)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    "The shipped model behind a real server."
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed; `make test-app` installs it")
    if not CHROMIUM: pytest.skip("no Chromium found; install one, such as: apt-get install chromium")
    arm = load_model(MODEL)
    shown = examples(tmp_path_factory.mktemp("examples"), ["openmoji", "shapes"])
    app = demo.build_app(arm, shown)
    yield arm, demo.serve(app, port=free_port()), shown
    app.close(verbose=False)


@pytest.fixture(scope="module")
def browser(served):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(served, browser, request):
    "A fresh window; the test fails if it loads anything from elsewhere or breaks."
    width, height = getattr(request, "param", (1280, 1000))
    page, hosts, broken = browser.new_page(viewport=dict(width=width, height=height)), set(), []
    page.on("request", lambda r: hosts.add(httpx.URL(r.url).host) if r.url.startswith(("http", "ws")) else None)
    page.on("pageerror", lambda e: broken.append(str(e)))
    page.goto(served[1])
    page.get_by_label("what to draw").wait_for(timeout=60_000)
    yield page
    page.close()
    assert hosts == {"127.0.0.1"} and not broken, (hosts, broken)


def tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    panel.first.wait_for()
    return panel.first


def shot(page, name):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(600)
    page.screenshot(path=SHOTS/f"{name}.png")
    assert (SHOTS/f"{name}.png").stat().st_size > 10_000


def press(panel, word): panel.get_by_role("button", name=word, exact=True).click()
def done(panel): panel.get_by_text(re.compile("done: ")).wait_for(timeout=90_000)


def test_browser_imagine(page, fed):
    panel = tab(page, "Imagine")
    panel.get_by_label("what to draw").fill("a red circle above a small blue square")
    press(panel, "Draw")
    panel.get_by_text(re.compile(r"\d+ of 36 tokens")).wait_for(timeout=60_000)
    shot(page, "imagine-half")
    done(panel)
    assert panel.locator(".grid-container img, .gallery-item img, .thumbnail-item img").count() == 4 and panel.get_by_label("what the model said").input_value()
    shot(page, "imagine")


def test_browser_stop(page, served, fed):
    panel = tab(page, "Imagine")
    panel.get_by_text(served[2].captions[-1], exact=True).click()
    until(lambda: (page.wait_for_timeout(50), panel.get_by_label("what to draw").input_value() == served[2].captions[-1])[1])
    press(panel, "Draw")
    panel.get_by_text(re.compile(r"\d+ of 36 tokens")).wait_for(timeout=60_000)
    press(panel, "Stop")
    panel.get_by_text("Stopped.").wait_for(timeout=20_000)
    page.wait_for_timeout(800)
    then = len(fed)
    page.wait_for_timeout(800)
    assert len(fed) == then
    shot(page, "stopped")
    press(panel, "Draw")
    done(panel)


def test_browser_edit_and_microscope(page, tmp_path):
    scene(1, (3, 3)).save(tmp_path/"in.png")
    panel = tab(page, "Edit")
    panel.locator("input[type=file]").first.set_input_files(tmp_path/"in.png")
    panel.locator("img").first.wait_for(timeout=20_000)
    for words, name in (("paint the square red", "edit"), ("make it <img src=x onerror='window.broken=1'> ${window.broken=2}", "injected")):
        panel = tab(page, "Edit")
        panel.get_by_label("what to change").fill(words)
        press(panel, "Change it")
        page.wait_for_timeout(300)
        done(panel)
        shot(page, name)
        panel = tab(page, "Microscope")
        page.locator("#microscope svg").first.wait_for(timeout=60_000)
        until(lambda: (page.wait_for_timeout(50), words.split()[1] in re.sub(r"[\s·]", "", panel.locator("svg").first.text_content()))[1])
        assert "bits of surprise" in panel.inner_text() and page.evaluate("window.broken") is None
        shot(page, name.replace("edit", "microscope"))


def test_browser_ask(page, served, tmp_path):
    scene(1, (3, 3)).save(tmp_path/"in.png")
    panel = tab(page, "Ask")
    panel.locator("input[type=file]").first.set_input_files(tmp_path/"in.png")
    panel.locator("img").first.wait_for(timeout=20_000)
    panel.get_by_label("question").fill("how many objects are there?")
    press(panel, "Ask")
    panel.get_by_text("done", exact=True).wait_for(timeout=60_000)
    pixels = to_float(torch.from_numpy(np.array(scene(1, (3, 3)))).permute(2, 0, 1))
    assert panel.get_by_label("answer").input_value() == served[0].answer(pixels, "how many objects are there?")
    shot(page, "ask")


def test_browser_reconstruct_an_example_then_a_photograph(page, tmp_path):
    panel = tab(page, "Reconstruct")
    panel.locator("table img, .gallery img, button img").first.click()
    panel.locator("[data-testid=image] img, .image-frame img, .image-container img").first.wait_for(timeout=20_000)
    press(panel, "There and back")
    panel.get_by_text("bits each").wait_for(timeout=60_000)
    shot(page, "reconstruct")
    (tmp_path/"letter.png").write_text("Dear model,")
    panel.get_by_label("Remove Image").first.click()
    panel.locator("input[type=file]").first.set_input_files(tmp_path/"letter.png")
    page.wait_for_timeout(800)
    press(panel, "There and back")
    page.get_by_text("is not a picture").wait_for(timeout=30_000)
    shot(page, "refused")


def test_browser_says_what_is_wrong(page):
    panel = tab(page, "Imagine")
    panel.get_by_label("what to draw").fill(" ")
    press(panel, "Draw")
    page.get_by_text("say in words what you want").wait_for(timeout=30_000)
    assert "Traceback" not in page.inner_text("body")
    panel = tab(page, "Ask")
    press(panel, "Ask")
    page.get_by_text("there is no picture").wait_for(timeout=30_000)


@pytest.mark.parametrize("page", [(390, 844)], indirect=True)
def test_browser_on_a_telephone(page, tmp_path):
    for name in ("Edit", "Ask", "Imagine"):
        if name == "Imagine" or page.get_by_role("tab", name=name, exact=True).is_visible(): tab(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
    panel = page.get_by_role("tabpanel").filter(visible=True).first
    panel.get_by_label("what to draw").fill("three green triangles")
    press(panel, "Draw")
    done(panel)
    panel.get_by_text(re.compile("done: ")).scroll_into_view_if_needed()
    page.mouse.wheel(0, 300)
    shot(page, "phone")
