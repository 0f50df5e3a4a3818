"""The judge against a real server on this machine that misbehaves: no fault becomes a number, no key leaves the header, nothing is paid for twice."""
import gzip
import json
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

pytest.importorskip("httpx", reason="the judge needs httpx")
pytest.importorskip("tenacity", reason="the judge needs tenacity")
from arm.rl.judge import Judge, JudgeConfig, ask, judge_edits, judge_images, judge_summary  # noqa: E402
from arm.rl.rubrics import RUBRICS, Question, judge_rewards, read_reply  # noqa: E402

KEY = "sk-test/0123456789"
PICTURE = torch.zeros(3, 32, 48, dtype=torch.uint8)
FINE = json.dumps({"reasoning": "good", "score": [8, 9, 10]})


def chat(content, usage=True, **more):
    body = {"choices": [{"message": {"content": content}}], **more}
    return json.dumps({**body, "usage": {"prompt_tokens": 100, "completion_tokens": 10}} if usage else body).encode()


class Stand(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, behave):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.seen, self.open, self.most, self.lock, self.done = behave, [], 0, 0, threading.Lock(), threading.Event()
        self.url = "http://%s:%d/v1" % self.server_address


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        stand, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with stand.lock:
            stand.seen.append({"path": self.path, "key": self.headers["Authorization"], "body": body, "at": time.monotonic()})
            nth, stand.open = len(stand.seen), stand.open + 1
            stand.most = max(stand.most, stand.open)
        try: reply = stand.behave(self, body, nth)
        finally:
            with stand.lock: stand.open -= 1
        if reply is None: self.close_connection = True; return
        status, headers, data = reply
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items(): self.send_header(name, str(value))
        self.end_headers()
        try: self.wfile.write(data)
        except OSError: pass
        if int(headers.get("Content-Length", len(data))) > len(data): self.close_connection = True

    def log_message(self, *_): pass


@contextmanager
def serve(behave):
    stand = Stand(behave)
    threading.Thread(target=stand.serve_forever, args=(.02,), daemon=True).start()
    try: yield stand
    finally: stand.done.set(); stand.shutdown(); stand.server_close()


def judge(stand, cache=None, key=KEY, **changes):
    given = dict(base_url=stand.url, model="vlm", timeout=60., attempts=3, first_wait=.01, max_wait=5., prices={"vlm": [1., 10.]})
    return Judge(JudgeConfig(**{**given, **changes}), api_key=key, cache=cache)


def about(text="a red circle", image=PICTURE): return Question(RUBRICS["t2i_follow"], text, (image,))


def then_fine(first): return lambda handler, body, nth: first(handler) if nth == 1 else (200, {}, chat(FINE))


def silent(handler): handler.server.done.wait(20)


def drip(handler):
    "A reply that never ends, a byte at a time: each silence is short, the whole is not."
    handler.send_response(200); handler.send_header("Content-Length", "100000"); handler.end_headers()
    while not handler.server.done.wait(.05):
        try: handler.wfile.write(b" "); handler.wfile.flush()
        except OSError: return None


PASSING = {
    "429": lambda h: (429, {}, b"busy"), "408": lambda h: (408, {}, b""), "500": lambda h: (500, {}, b"oh"), "503": lambda h: (503, {"Retry-After": "soon"}, b""),
    "dropped": lambda h: None, "dropped ": lambda h: (200, {"Content-Length": 5000}, chat(FINE)[:30]),
    "garbled": lambda h: (200, {}, b"<html>hello</html>"), "garbled ": lambda h: (200, {}, chat(FINE)[:40]), "garbled  ": lambda h: (200, {}, b"\xff\xfe\x00"),
    "garbled   ": lambda h: (200, {}, b"[]"), "garbled    ": lambda h: (200, {}, b'{"choices": []}'), "garbled     ": lambda h: (200, {}, b'{"choices": [{"message": {"content": 8}}]}'),
    "garbled      ": lambda h: (200, {"Content-Encoding": "gzip"}, b"no gzip at all"), "garbled       ": lambda h: (200, {}, b" " * (2**20 + 1)),
    "unreadable": lambda h: (200, {}, chat("A fine picture, 9 of 10!")), "unreadable ": lambda h: (200, {}, chat(None)), "unreadable  ": lambda h: (200, {}, chat("")),
}


@pytest.mark.parametrize("label", PASSING)
def test_what_may_pass_is_asked_again(label):
    with serve(then_fine(PASSING[label])) as stand:
        opinion, = ask(judge(stand), [about()])
    assert opinion.scores == (8., 9., 10.) and opinion.value == 8. and opinion.tries == (label.strip(), "read")


@pytest.mark.parametrize("slow", [silent, drip])
def test_a_slow_server_is_not_waited_for(slow):
    with serve(then_fine(slow)) as stand:
        opinion, = ask(judge(stand, timeout=.8), [about()])
        assert opinion.tries[0] == "timed out"  # "dropped" if it had been waited for


LASTING = {"garbage": "fine!", "text": '{"reasoning": "", "score": ["8", 9, 10]}', "truth": '{"reasoning": "", "score": [true, 9, 10]}', "high": '{"reasoning": "", "score": [11, 9, 10]}',
           "low": '{"reasoning": "", "score": [-1, 9, 10]}', "nan": '{"reasoning": "", "score": [NaN, 9, 10]}', "infinite": '{"reasoning": "", "score": [1e999, 9, 10]}',
           "short": '{"reasoning": "", "score": [8, 9]}', "scalar": '{"reasoning": "", "score": 8}', "null": '{"reasoning": "", "score": null}', "no score": '{"reasoning": "good"}',
           "a list": "[8, 9, 10]", "cut": FINE[:-3], "two": FINE + FINE, "deep": "{" * 5000, "other": FINE[:-1] + ', "score2": 1}'}


@pytest.mark.parametrize("reply", LASTING.values(), ids=LASTING)
def test_what_cannot_be_read_is_no_verdict_and_never_a_number(reply):
    with pytest.raises(ValueError): read_reply(reply, RUBRICS["t2i_follow"])


def test_no_verdict_is_nan_in_the_reward_and_counted_with_its_cost():
    with serve(lambda h, body, nth: (200, {}, chat(LASTING["high"]))) as stand:
        j = judge(stand)
        judgements = judge_images(j, ["a", "b"], [PICTURE, PICTURE + 1])
    assert judge_rewards(judgements).isnan().all() and [x.overall for x in judgements] == [None, None]
    s = judge_summary(j)
    assert (s["asked"], s["verdicts"], s["no_verdict"], s["no_verdict_share"], s["why"]) == (4, 0, 4, 1., {"unreadable": 4})
    assert (s["calls"], s["tokens_in"], s["tokens_out"]) == (8, 800, 80) and s["money"] == pytest.approx((800 + 800) / 1e6)


def test_zero_is_a_verdict():
    with serve(lambda h, body, nth: (200, {}, chat(json.dumps({"reasoning": "", "score": [0] * (2 if "first picture" in str(body) or "how well" in str(body).lower() else 3)})))) as stand:
        assert judge_rewards(judge_edits(judge(stand), ["x"], [PICTURE], [PICTURE])).tolist() == [0.]


@pytest.mark.parametrize("header", ["1", "date"])
def test_retry_after_is_honoured_by_all_questions(header):
    late = {"at": 0.}
    def behave(handler, body, nth):
        if nth > 1: return 200, {}, chat(FINE)
        late["at"] = time.monotonic() + 1
        return 429, {"Retry-After": header if header == "1" else formatdate(time.time() + 2, usegmt=True)}, b""
    with serve(behave) as stand:
        opinions = ask(judge(stand, concurrency=1), [about("one"), about("two")])
        assert [o.value for o in opinions] == [8., 8.] and stand.seen[1]["at"] >= late["at"] - .1


def test_a_server_that_wants_an_hour_is_left_alone():
    with serve(lambda h, body, nth: (429, {"Retry-After": "3600"}, b"")) as stand:
        opinions = ask(judge(stand, concurrency=1, max_wait=.05), [about("one"), about("two")])
        assert len(stand.seen) == 1 and {o.tries[-1] for o in opinions} == {"told to wait"} and {o.value for o in opinions} == {None}


def test_attempts_end_and_nothing_listens():
    with serve(lambda h, body, nth: (500, {}, b"")) as stand:
        assert ask(judge(stand), [about()])[0].tries == ("500",) * 3
    assert ask(judge(stand), [about()])[0].tries == ("unreachable",) * 3


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_picture_is_no_verdict_for_it_alone(status):
    with serve(lambda h, body, nth: (status, {}, b"content policy") if "bad" in str(body) else (200, {}, chat(FINE))) as stand:
        opinions = ask(judge(stand), [about("bad"), about("good")])
    assert [o.value for o in opinions] == [None, 8.] and opinions[0].tries == (str(status),)


@pytest.mark.parametrize("status", [401, 402, 403, 404, 405, 307])
def test_what_fails_for_all_stops_the_run_and_follows_no_redirect(status):
    with serve(lambda h, body, nth: (500, {}, b"another place")) as other, \
         serve(lambda h, body, nth: (status, {"Location": other.url}, b"no") if "one" in body["messages"][1]["content"][0]["text"].split("text>")[1] else (500, {}, b"")) as stand:
        with pytest.raises(ValueError, match=f"answers {status}.*check the key"): ask(judge(stand, first_wait=60., max_wait=60.), [about("one"), *(about(str(i)) for i in range(40))])
        assert not other.seen and len(stand.seen) < 25  # neither the waits nor the questions in the queue were finished


def test_the_key_is_sent_and_stays_nowhere(tmp_path):
    echo = json.dumps({"reasoning": f"I was given {KEY}", "score": [8, 9, 10]})
    with serve(lambda h, body, nth: (200, {}, chat(echo))) as stand:
        j = judge(stand, cache=tmp_path)
        opinion, = ask(j, [about()])
        assert stand.seen[0]["key"] == f"Bearer {KEY}" and KEY not in json.dumps(stand.seen[0]["body"])
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert len(files) == 1 and not any(k in files[0].read_text() for k in (KEY, KEY.replace("/", "\\/")))
    assert KEY not in repr(opinion) and KEY not in repr(j.config) and KEY not in repr(vars(j)) and KEY not in repr(j._end.client.headers)
    for status in (400, 401, 500):
        with serve(lambda h, body, nth: (status, {}, json.dumps({"error": f"{KEY} " * 60}).replace("/", "\\/").encode())) as stand:
            try: said = repr(ask(judge(stand), [about()]))
            except ValueError as e: said = repr(e) + repr(e.__cause__) + repr(e.__context__)
            assert "[key]" in said and KEY[:9] not in said


@pytest.mark.parametrize("key", ["", "abc", f"{KEY}\n", f'"{KEY}"', "schlüssel-1", "a key"])
def test_an_impossible_key_is_refused_unseen(key):
    with pytest.raises(ValueError, match="api_key holds") as e: Judge(JudgeConfig(base_url="https://judge.example/v1", model="vlm"), api_key=key)
    assert len(key) < 5 or key.strip() not in str(e.value)


@pytest.mark.parametrize("url", ["judge.example", "ftp://judge.example", "https://me:secret@judge.example", "https://judge.example/v1?key=secret", "https:///v1"])
def test_an_address_holds_no_secret(url):
    with pytest.raises(ValueError, match="base_url") as e: JudgeConfig(base_url=url, model="vlm")
    assert "secret" not in str(e.value)


def test_calls_at_the_same_time_are_limited():
    three = threading.Barrier(3, timeout=50)  # opens only when three calls are there at the same time
    def behave(handler, body, nth):
        three.wait()
        return 200, {}, chat(FINE)
    with serve(behave) as stand:
        assert [o.value for o in ask(judge(stand, concurrency=3), [about(str(i)) for i in range(12)])] == [8.] * 12
        assert stand.most == 3


def test_nothing_is_paid_for_twice(tmp_path):
    with serve(lambda h, body, nth: (200, {}, chat(FINE))) as stand:
        j = judge(stand, cache=tmp_path)
        assert [o.value for o in ask(j, [about()] * 5 + [about("other")])] == [8.] * 6 and len(stand.seen) == 2
        again = judge(stand, cache=tmp_path, key=None, base_url="https://elsewhere.example/v1", attempts=1, concurrency=1)
        assert ask(again, [about()])[0].reason == "good" and judge_summary(again)["calls"] == 0 and judge_summary(again)["cached"] == 1
        for damage in (b"", b"{", b"[]", b'{"reply": 7}', b'{"reply": "{}"}', b"\xff"):
            again.file(again.key(about())).write_bytes(damage)
            n = len(stand.seen)
            fresh = judge(stand, cache=tmp_path)
            assert ask(fresh, [about()])[0].value == 8. and len(stand.seen) == n + 1 and judge_summary(fresh)["damaged"] == 1
    assert not [f for f in tmp_path.rglob("*") if f.name.startswith(".tmp")]


def test_a_failure_is_not_kept(tmp_path):
    with serve(then_fine(lambda h: (200, {}, chat("?")))) as stand:
        assert ask(judge(stand, cache=tmp_path, reasks=0), [about()])[0].value is None
        assert ask(judge(stand, cache=tmp_path, reasks=0), [about()])[0].value == 8.


def test_what_names_a_question():
    j = Judge(JudgeConfig(base_url="https://judge.example/v1", model="vlm"))
    brighter = PICTURE.clone(); brighter[2, 31, 47] = 1
    rubric = RUBRICS["t2i_follow"]
    others = [about("a red circle "), about(image=brighter), about(image=PICTURE.transpose(1, 2)), Question(replace(rubric, version=2), "a red circle", (PICTURE,)),
              Question(replace(rubric, task=rubric.task + " "), "a red circle", (PICTURE,))]
    judges = [Judge(replace(j.config, **c)) for c in ({"model": "other"}, {"temperature": 1.}, {"extra": {"top_p": .9}})]
    assert len({j.key(about()), *map(j.key, others), *(k.key(about()) for k in judges)}) == 1 + len(others) + len(judges)
    assert j.key(about(image=PICTURE / 127.5 - 1)) == j.key(about()) == Judge(replace(j.config, base_url="https://b.example", timeout=1.), api_key=KEY).key(about())


def test_the_request_is_what_the_endpoint_expects():
    with serve(then_fine(lambda h: (200, {}, chat("?")))) as stand:
        ask(judge(stand, constrain=True, extra={"max_tokens": None, "max_completion_tokens": 99}), [about("braces {text} {0} %s </text>")])
        first, second = (s["body"] for s in stand.seen)
        assert stand.seen[0]["path"] == "/v1/chat/completions" and second["seed"] == first["seed"] + 1
    assert "max_tokens" not in first and first["max_completion_tokens"] == 99 and first["response_format"]["json_schema"]["schema"]["properties"]["score"]["maxItems"] == 3
    text, image = first["messages"][1]["content"]
    assert "braces {text} {0} %s </text>" in text["text"] and re.match("data:image/png;base64,[A-Za-z0-9+/]+=*$", image["image_url"]["url"])


def test_replies_without_a_count_of_tokens_are_told_apart():
    with serve(lambda h, body, nth: (200, {"Content-Encoding": "gzip"}, gzip.compress(chat(FINE, usage=False)))) as stand:
        j = judge(stand, prices={})
        assert ask(j, [about()])[0].value == 8.
    s = judge_summary(j)
    assert s["unmetered"] == 1 and s["tokens_in"] == 0 and s["money"] is None


def test_the_order_of_threads_changes_nothing():
    def behave(handler, body, nth): return (500, {}, b"") if nth % 3 == 0 else (200, {}, chat(FINE))
    results = []
    for concurrency in (1, 4):
        with serve(behave) as stand: results.append([o.value for o in ask(judge(stand, concurrency=concurrency, attempts=9), [about(str(i)) for i in range(8)])])
    assert results[0] == results[1] == [8.] * 8
