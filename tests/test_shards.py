"""Shards from end to end: what is converted is what is read, by any number of processes, after any stop, and whatever is damaged."""
import json
import random
from collections import Counter
from io import BytesIO

import numpy as np
import pytest
import torch
from arm.app.cli import main
from arm.core import load_json, make_rng
from arm.data.text import default_tokenizer
from arm.model.sequence import Vocab
from arm.train.convert import PictureEncoder, check_shards, convert, parquet_rows
from arm.train.data import StepDataset, StepSampler
from arm.train.shards import KINDS, Damage, Shards, index_shards, read_sample, scan
from arm.train.stream import MIXTURES, Order, ShardedTokens, Turns, read_skips, stage_sources
from PIL import Image
from torch.utils.data import DataLoader

pytest.importorskip("webdataset", reason="needs the extra: pip install 'arm[data]'")
TEXT = default_tokenizer()
VOCAB = Vocab(TEXT.vocab_size, 2**16)


class Half:
    "Stands in for a tokenizer: 8 px per code, and a code is the mean brightness."
    class cfg: patch_size = 8
    def encode(self, x): return ((torch.nn.functional.avg_pool2d(x.mean(1, keepdim=True), 8) + 1) * 30_000).long().flatten(1)


ENCODE = PictureEncoder(Half(), [(2, 2), (2, 3)], name="half")


def picture(path, i, size=(16, 16), form="PNG"):
    Image.fromarray(np.full((*size, 3), i % 256, dtype=np.uint8)).save(path, format=form)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    "A list with all kinds; the caption of row i says i."
    home = tmp_path_factory.mktemp("rows")
    lines = []
    for i in range(120):
        name, after = f"{i}.{('png', 'jpg', 'webp')[i % 3]}", f"{i}-after.png"
        picture(home / name, i, form=("PNG", "JPEG", "WEBP")[i % 3]), picture(home / after, i + 1, (16, 24))
        lines.append([dict(image=name, caption=f"grey {i}"), dict(source=name, instruction=f"lighter {i}", target=after), dict(image=name, caption=f"grey {i}", conversation=[["how dark?", str(i)]]),
                      dict(parts=[f"first {i}", dict(image=name), "then", dict(image=after)]), dict(text=f"words {i}")][i % 5])
    (home / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return home / "rows.jsonl"


@pytest.fixture(scope="module")
def coded(rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("coded")
    convert(rows, out, samples=25, encode=ENCODE, progress=False)
    return out


def ids(batches): return [tuple(r[r != VOCAB.pad].tolist()) for b in batches for r in b.input_ids]
def stream(folder, **more): return ShardedTokens(stage_sources("pt", Shards(folder)), VOCAB, TEXT, 24, **more)


def test_all_kinds_come_back_as_they_went_in(rows, tmp_path):
    index = convert(rows, tmp_path, samples=25, progress=False)
    assert index["samples"] == {"image-text": 48, "edit": 24, "interleaved": 24, "text": 24} and index["complete"] and not index["damaged"]
    shards = Shards(tmp_path)
    seen = [shards.read(kind, s, j) for kind in KINDS for s in range(5) for j in range(shards.counts(kind)[s])]
    assert sorted(i.words["text"] for i in seen if i.kind == "text") == sorted(f"words {i}" for i in range(4, 120, 5))
    edits = {i.words["instruction"]: [p.size for p in i.pictures] for i in seen if i.kind == "edit"}
    assert edits == {f"lighter {i}": [(16, 16), (24, 16)] for i in range(1, 120, 5)}
    assert all(r["same"] and not r["damaged"] for r in check_shards(tmp_path, progress=False))


def test_the_library_reads_our_shards_and_we_read_its_own(coded, tmp_path):
    import webdataset as wds
    theirs = {s["__key__"]: {k: v for k, v in s.items() if k[0] != "_"} for s in wds.WebDataset([str(coded/"000000.tar")], shardshuffle=False)}
    for e in scan(coded/"000000.tar")[0]: assert set(theirs[e.key]) == set(e.parts)
    with wds.TarWriter(str(tmp_path/"a.tar")) as out:
        for i in range(5): out.write({"__key__": "folder/" * (20 * (i == 3)) + f"{i:04d}", "png": Image.new("RGB", (8, 8), (i, i, i)), "txt": f"number {i}"})
    index_shards(tmp_path)
    assert [Shards(tmp_path).read("image-text", 0, j).words["captions"] for j in range(5)] == [[f"number {i}"] for i in range(5)]


# ---- order, resume, processes -------------------------------------------------------------------------------------------------

def test_steps_are_functions_of_their_number_whoever_asks(coded):
    one, again = stream(coded), stream(coded)
    whole = [sorted(ids(one(step, 0, 1))) for step in range(6)]
    assert whole[4] == sorted(ids(again(4, 0, 1))), "a resumed run goes on with the same step"
    for world in (2, 3, 8): assert sorted(x for r in range(world) for x in ids(again(5, r, world))) == whole[5]
    assert stream(coded, seed=1)(0, 0, 1)[0].input_ids.tolist() != one(0, 0, 1)[0].input_ids.tolist()


def test_workers_give_the_steps_of_one_process_also_after_a_stop(coded):
    draw = stream(coded)
    expected = [ids(draw(step, 0, 2)) for step in range(2, 6)]
    loader = DataLoader(StepDataset(draw, 6, 0, 2), batch_size=None, sampler=StepSampler(6, lambda: 2), num_workers=2, multiprocessing_context="fork")
    assert [ids(b) for b in loader] == expected


def test_every_sample_comes_once_per_epoch_and_each_epoch_is_another_shuffle():
    counts = [random.Random(s).randrange(0, 30) for s in range(20)]
    order, n = Order(counts, 0, window=4), sum(counts)
    epochs = [[order[p] for p in range(e * n, (e + 1) * n)] for e in range(3)]
    assert all(sorted(e) == sorted(epochs[0]) and len(set(e)) == n for e in epochs) and epochs[0] != epochs[1] != epochs[2]
    backwards = Order(counts, 0, window=4)
    assert [backwards[p] for p in reversed(range(n))] == epochs[0][::-1], "nothing depends on where one comes from"


@pytest.mark.parametrize("stage", MIXTURES)
def test_realised_shares_are_the_mixture(stage, coded):
    draw = ShardedTokens(stage_sources(stage, Shards(coded)), VOCAB, TEXT, 24)
    seen = Counter(draw.sources[draw.turns(n)[0]].task for n in range(5000))
    assert {t: k / 5000 for t, k in seen.items()} == {t: pytest.approx(s) for t, s in MIXTURES[stage].items()}
    for a in range(0, 5000, 500): # and nowhere far from it
        part = Counter(draw.sources[draw.turns(n)[0]].task for n in range(a, a + 500))
        assert all(abs(part[t] / 500 - s) < .1 for t, s in MIXTURES[stage].items())
    assert Turns([.2, .8], 0).quota == [200, 800]


def test_packed_rows_are_equally_many_on_every_process_and_hardly_filled_up(coded):
    draw = ShardedTokens(stage_sources("sft", Shards(coded)), VOCAB, TEXT, 256, parts=2, max_tokens=4096)
    shares = [draw(0, r, 2) for r in range(2)]
    assert [len(s) for s in shares] == [2, 2] and not draw.skips.counts
    real = sum(int((b.input_ids != VOCAB.pad).sum()) for s in shares for b in s)
    assert 1 - real / sum(b.input_ids.numel() for s in shares for b in s) < .02


# ---- damage -------------------------------------------------------------------------------------------------------------------

def bomb():
    raw = bytearray((lambda f: (Image.new("1", (8, 8)).save(f, format="PNG"), f.getvalue())[1])(BytesIO()))
    import zlib
    raw[16:24] = (60_000).to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    return bytes(raw)


def test_damaged_rows_are_left_out_and_counted(tmp_path):
    src = tmp_path/"src"
    src.mkdir()
    picture(src/"good.png", 1), picture(src/"cut.png", 2), (src/"bomb.png").write_bytes(bomb())
    (src/"cut.png").write_bytes((src/"cut.png").read_bytes()[:50])
    bad = ['{"image": "good.png", "caption": "fine"}', "{", "[1]", '{"image": "cut.png", "caption": "a"}', '{"image": "bomb.png", "caption": "a"}', '{"image": "none.png", "caption": "a"}',
           '{"image": "good.png"}', '{"image": "good.png", "caption": 7}', '{"source": "good.png", "instruction": "a"}', '{"text": ""}', '{"image": "good.png", "conversation": "hm"}',
           '{"parts": ["no picture"]}', '{"text": "\\ud800"}', "[" * 5000, '{"image": "\\u0000", "caption": "a"}', '{"kind": 3}', '{"text": "last"}']
    (src/"rows.jsonl").write_text("\n".join(bad))
    index = convert(src/"rows.jsonl", tmp_path/"out", progress=False)
    assert index["samples"] == {"image-text": 1, "text": 1}
    assert index["damaged"]["picture"] == 1 and index["damaged"]["pixels"] == 1 and sum(index["damaged"].values()) == len(bad) - 2


def test_any_bytes_in_a_shard_are_read_or_refused_but_never_raise(coded, tmp_path):
    rng, whole = make_rng(0, "any bytes"), (coded/"000000.tar").read_bytes()
    for trial in range(60):
        raw = bytearray(whole)
        for _ in range(rng.choice((1, 5, 200))): raw[rng.randrange(len(raw))] = rng.randrange(256)
        if trial % 3 == 0: raw = raw[:rng.randrange(len(raw))]
        (tmp_path/"a.tar").write_bytes(raw)
        entries, bad = scan(tmp_path/"a.tar")
        assert len(entries) <= 25
        index_shards(tmp_path)
        shards = Shards(tmp_path)
        for kind in KINDS:
            for j in range(shards.counts(kind)[0]):
                try: shards.read(kind, 0, j)
                except Damage: pass
    for _ in range(200):
        junk = {k: rng.randbytes(rng.randrange(80)) for k in rng.sample(["json", "npy", "0.png", "1.jpg", "txt", "webp"], 2)}
        with pytest.raises(Damage): read_sample({"json": b"{}", **junk} if "txt" not in junk else {"json": b"[", **junk})


def hurt(coded, out):
    "A cut shard, a wiped header, a changed code, an empty file, a lost one."
    import shutil
    shutil.copytree(coded, out)
    name = lambda k: out/f"{k:06d}.tar"
    raw = name(0).read_bytes(); name(0).write_bytes(raw[:len(raw) // 2])
    raw = bytearray(name(1).read_bytes()); raw[:512] = b"\xff" * 512; name(1).write_bytes(raw)
    raw = bytearray(name(2).read_bytes()); raw[scan(name(2))[0][3].parts["json"][0]] ^= 1; name(2).write_bytes(raw)
    name(3).write_bytes(b""); name(4).unlink()
    return out


def test_a_run_over_damaged_shards_goes_on_and_says_what_it_left_out(coded, tmp_path):
    folder = hurt(coded, tmp_path/"hurt")
    draw, sound = stream(folder, log=tmp_path/"skipped.jsonl"), stream(coded)
    for step in range(8):
        documents = ids(draw(step, 0, 1))
        assert len(documents) == 24
    assert set(read_skips(tmp_path/"skipped.jsonl")) >= {"cut off", "missing"} and draw.skips.counts
    rows = {r["name"]: r for r in check_shards(folder, progress=False)}
    assert rows["000001.tar"]["damaged"] == {} and not rows["000001.tar"]["same"], "a header is lost, its sample is not"
    assert rows["000002.tar"]["damaged"] == {"changed": 1} and rows["000002.tar"]["samples"] == 24
    assert rows["000003.tar"]["samples"] == 0 and set(rows["000004.tar"]["damaged"]) == {"missing"}
    assert 0 < rows["000000.tar"]["samples"] < 25
    for name in folder.glob("*.tar"): name.unlink()
    with pytest.raises(ValueError, match="50 samples of task"): stream(folder)(0, 0, 1)
    assert sound(0, 0, 1)


# ---- conversion ---------------------------------------------------------------------------------------------------------------

def test_an_interrupted_conversion_goes_on_to_the_same_bytes(rows, coded, tmp_path, monkeypatch):
    calls = []
    def stops(pictures):
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt
        return ENCODE(pictures)
    stops.name = "half"
    with pytest.raises(KeyboardInterrupt): convert(rows, tmp_path, samples=25, encode=stops, progress=False)
    assert len(load_json(tmp_path/"index.json")["shards"]) == 3 and not load_json(tmp_path/"index.json")["complete"]
    convert(rows, tmp_path, samples=25, encode=ENCODE, progress=False)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in coded.iterdir()}
    with pytest.raises(ValueError, match="another conversion"): convert(rows, tmp_path, samples=25, progress=False)


def test_a_folder_of_pictures_with_captions(tmp_path):
    (tmp_path/"in"/"sub").mkdir(parents=True)
    for i, form in enumerate(("png", "jpg", "gif")): picture(tmp_path/"in"/"sub"/f"{i}.{form}", i, form=dict(jpg="jpeg").get(form, form))
    (tmp_path/"in"/"sub"/"0.txt").write_text("zero"); (tmp_path/"in"/"sub"/"1.json").write_text('{"captions": ["one", "uno"]}'); (tmp_path/"in"/"alone.txt").write_text("no picture")
    index = convert(tmp_path/"in", tmp_path/"out", progress=False)
    assert index["samples"] == {"image-text": 2, "text": 1} and index["damaged"] == {"words": 1}
    assert Shards(tmp_path/"out").read("image-text", 0, 1).words["captions"] == ["one", "uno"]


def test_parquet_tables(tmp_path, rows):
    pa = pytest.importorskip("pyarrow", reason="needs the extra: pip install 'arm[parquet]'")
    import pyarrow.parquet as pq
    png = lambda i: (lambda f: (picture(f, i), f.getvalue())[1])(BytesIO())
    pq.write_table(pa.table(dict(image=[dict(bytes=png(i), path=None) if i != 7 else None for i in range(20)], caption=[f"grey {i}" for i in range(20)])), tmp_path/"a.parquet", row_group_size=6)
    assert [r["caption"] for r in parquet_rows(tmp_path/"a.parquet")[1](11)] == [f"grey {i}" for i in range(11, 20)]
    index = convert(tmp_path/"a.parquet", tmp_path/"out", samples=8, progress=False)
    assert index["samples"] == {"image-text": 19, "text": 1}, "a row without a picture is a text"
    (tmp_path/"b.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match="no Parquet table"): convert(tmp_path/"b.parquet", tmp_path/"b", progress=False)


# ---- command line -------------------------------------------------------------------------------------------------------------

def test_the_command_converts_checks_and_refuses_in_one_line(rows, coded, tmp_path, capsys):
    assert main(["shards", "convert", str(rows), str(tmp_path/"out"), "--samples", "50"]) == 0
    assert "48 image-text" in capsys.readouterr().out
    assert main(["shards", "check", str(tmp_path/"out")]) == 0 and "120 samples" in capsys.readouterr().out
    assert main(["shards", "check", str(hurt(coded, tmp_path/"hurt"))]) == 2
    said = capsys.readouterr()
    assert "cut off" in said.out and said.err.strip().splitlines()[-1].startswith("arm: ")
    (tmp_path/"hurt"/"index.json").unlink()
    assert main(["shards", "index", str(tmp_path/"hurt")]) == 0
    for wrong in (["convert", str(tmp_path/"none"), str(tmp_path/"x")], ["convert", str(rows), str(tmp_path/"out"), "--samples", "7"], ["check", str(tmp_path)]):
        assert main(["shards", *wrong]) == 2
        assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("arm: ")]) == 1
    assert not (tmp_path/"x").exists()
