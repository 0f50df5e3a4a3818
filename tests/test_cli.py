"""The command line as strangers use it: what must work, and what must be refused in one line with nothing left behind."""
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from tools.strangers import chunk, encoded, files, icon, note, png, png16, refusal, run, scene, tiff, untrained

from arm.app import terminal
from arm.app.cli import main
from arm.core import atomic_write
from arm.model.export import export_hub
from arm.model.tasks import Arm

ARM = Path(sys.executable).parent/"arm"
RIGHT = scene()  # 48 px wide, 32 px high
PIXELS = np.asarray(RIGHT)


@pytest.fixture(scope="module")
def model(tmp_path_factory): return untrained(tmp_path_factory.mktemp("untrained"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RIGHT.save("in.png")
    return tmp_path


def refused(here, *argv) -> str:
    "The line of a refusal that leaves every file as it was."
    before = files(here)
    line = refusal(*run(*argv))
    assert files(here) == before, f"left behind: {set(files(here)) ^ set(before)}"
    return line


# ---- pictures that work -------------------------------------------------------------------------------------------------------

def half_clear(im):
    "The left half as it is; the right half invisible, and black underneath."
    out = im.convert("RGBA")
    out.paste((0, 0, 0, 0), (im.width//2, 0, im.width, im.height))
    return out


def half_white(im):
    out = im.copy()
    out.paste("white", (im.width//2, 0, im.width, im.height))
    return out


def lab(im): return ImageCms.profileToProfile(im, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")


GREY = RIGHT.convert("L")
WIDE = np.asarray(GREY).astype(np.uint16)*257
FOUR = RIGHT.quantize(16, dither=Image.Dither.NONE)
SAME = {  # name: (bytes of a file, the picture that must be seen in it)
    "rgba.png": (encoded(half_clear(RIGHT), "PNG"), half_white(RIGHT)),
    "rgba.webp": (encoded(half_clear(RIGHT), "WEBP", lossless=True), half_white(RIGHT)),
    "grey-alpha.png": (encoded(half_clear(GREY.convert("RGB")).convert("LA"), "PNG"), half_white(GREY.convert("RGB"))),
    "16bit-grey.png": (encoded(Image.fromarray(WIDE), "PNG"), GREY),
    "16bit-grey.tiff": (encoded(Image.fromarray(WIDE), "TIFF"), GREY),
    "16bit-rgb.png": (png16(PIXELS.astype(np.uint16)*257), RIGHT),
    "16bit-rgba.png": (png16(np.asarray(half_clear(RIGHT)).astype(np.uint16)*257), half_white(RIGHT)),
    "16bit-grey-alpha.png": (png16(np.asarray(half_clear(GREY.convert("RGB")).convert("LA")).astype(np.uint16)*257), half_white(GREY.convert("RGB"))),
    "32bit.tiff": (encoded(Image.fromarray(WIDE.astype(np.int32)), "TIFF"), GREY),
    "float.tiff": (encoded(Image.fromarray((np.asarray(GREY)/255).astype(np.float32)), "TIFF"), GREY),
    "palette.png": (encoded(FOUR, "PNG"), FOUR.convert("RGB")),
    "palette.gif": (encoded(FOUR, "GIF"), FOUR.convert("RGB")),
    "cmyk.tiff": (encoded(RIGHT.convert("CMYK"), "TIFF"), RIGHT.convert("CMYK").convert("RGB")),
    "grey.png": (encoded(GREY, "PNG"), GREY),
    "two-levels.png": (encoded(GREY.convert("1"), "PNG"), GREY.convert("1")),
    "animated.gif": (encoded(FOUR, "GIF", save_all=True, append_images=[Image.new("L", RIGHT.size)]*3), FOUR.convert("RGB")),
    "animated.png": (encoded(RIGHT, "PNG", save_all=True, append_images=[Image.new("RGB", RIGHT.size)]), RIGHT),
    "animated.webp": (encoded(RIGHT, "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", RIGHT.size)]), RIGHT),
    "upside-down.png": (encoded(RIGHT.rotate(180), "PNG", exif=note(3)), RIGHT),
    "sideways.png": (encoded(RIGHT.transpose(Image.Transpose.ROTATE_90), "PNG", exif=note(6)), RIGHT),
    "sideways.tiff": (encoded(RIGHT.transpose(Image.Transpose.ROTATE_270), "TIFF", exif=note(8)), RIGHT),
    "wrong-suffix.jpg": (encoded(RIGHT, "PNG"), RIGHT),
    "плохое имя 🙂.png": (encoded(RIGHT, "PNG"), RIGHT),
}


@pytest.mark.parametrize("name", SAME)
def test_reads_every_kind_of_picture_exactly(name, here, model):
    data, seen = SAME[name]
    Path(name).write_bytes(data)
    seen.convert("RGB").save("plain.png")
    for source, out in ((name, "a.png"), ("plain.png", "b.png")):
        code, said, err = run("reconstruct", source, "-o", out, "--model", model)
        assert (code, err) == (0, "") and out in said
    assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes() and Image.open("a.png").size == RIGHT.size


FINE = dict(quality=95, subsampling=0)


@pytest.mark.parametrize("name, data, off", [
    ("photo.jpg", encoded(RIGHT, "JPEG", **FINE), 2), ("inks.jpg", encoded(RIGHT.convert("CMYK"), "JPEG", **FINE), 2), ("sideways.jpg", encoded(RIGHT.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=note(6), **FINE), 2),
    ("lab.tiff", encoded(lab(RIGHT), "TIFF"), 1), ("pic.bmp", encoded(RIGHT, "BMP"), 0), ("pic.ppm", encoded(RIGHT, "PPM"), 0), ("pic.jp2", encoded(RIGHT, "JPEG2000"), 0), ("pic.ico", encoded(RIGHT, "ICO"), 0)])
def test_reads_other_formats(name, data, off, here, model, monkeypatch):
    Path(name).write_bytes(data)
    seen, fit = [], terminal.fit_to
    monkeypatch.setattr("arm.app.cli.fit_to", lambda model, picture, name: seen.append(picture) or fit(model, picture, name))
    assert run("reconstruct", name, "-o", "out.png", "--model", model)[0] == 0
    right = RIGHT.resize(seen[0].size, Image.Resampling.LANCZOS) if name == "pic.ico" else RIGHT  # an icon is a square or smaller
    assert seen[0].mode == "RGB" and seen[0].size == right.size and np.abs(np.asarray(seen[0]).astype(int) - np.asarray(right)).mean() <= off, "mean error in levels of 256"


@pytest.mark.parametrize("w, h, fitted", [(640, 480, (48, 32)), (480, 640, (32, 48)), (500, 500, (48, 48)), (1, 1, (48, 48)), (3000, 2, (48, 32)), (1, 5000, (32, 48)), (47, 48, (48, 48))])
def test_fits_any_size_and_says_so(w, h, fitted, here, model):
    Image.new("RGB", (w, h), "red").save("any.png")
    code, _, err = run("reconstruct", "any.png", "-o", "out.png", "--model", model)
    assert code == 0 and Image.open("out.png").size == fitted
    assert err.startswith("note: any.png: ") and err.count("\n") == 1 and all(str(n) in err for n in (w, h, *fitted))


def test_known_sizes_pass_without_a_note(here, model):
    for canvas in ((2, 2), (2, 3), (3, 2), (3, 3)):
        scene(1, canvas).save("known.png")
        assert run("reconstruct", "known.png", "-o", "out.png", "--model", model)[::2] == (0, "")


# ---- words --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompt", ["a red circle", "красный круг", "赤い丸の上に青い四角", "دائرة حمراء فوق مربع", "लाल वृत्त", "עיגול אדום", "🔴 above 🟦", "👩🏾\u200d🚒", "e\u0301", "a\tb\nc", "-- not an option", "%s {0} $HOME \\", "\x00\x1b[31m"])
def test_prompts_in_any_script(prompt, here, model):
    assert run("imagine", "--size", "8x8", "-o", "out.png", "--model", model, "--", prompt)[0] == 0
    assert run("edit", "-o", "out.png", "--model", model, "--", "in.png", prompt)[0] == 0
    assert run("ask", "--model", model, "--", "in.png", prompt)[0] == 0


@pytest.mark.parametrize("prompt, says", [("", "empty"), (" \n\t", "empty"), ("red " * 500, "shorten"), ("円" * 100_000, "shorten"), ("\udcff\udcfe", "UTF-8")])
def test_refuses_no_words_too_many_words_and_no_text(prompt, says, here, model):
    for argv in (["imagine", prompt], ["edit", "in.png", prompt], ["ask", "in.png", prompt]):
        assert says in refused(here, *argv, "--model", model)


# ---- what comes out -----------------------------------------------------------------------------------------------------------

def test_a_transformer_and_its_picture_tokenizer_from_two_places(here, model):
    arm = Arm.from_pretrained(model)
    export_hub(arm.model, here/"sft", text=arm.text)
    assert "name its picture tokenizer after a comma" in refused(here, "imagine", "a cat", "--model", "sft")
    assert "no model folder" in refused(here, "imagine", "a cat", "--model", f"nowhere,{model}")
    assert "nowhere" in refused(here, "imagine", "a cat", "--model", "sft,nowhere")
    assert run("imagine", "a cat", "--size", "32x48", "-o", "joined.png", "--model", f"sft,{model}")[0] == 0
    assert run("imagine", "a cat", "--size", "32x48", "-o", "whole.png", "--model", model)[0] == 0
    assert Path("joined.png").read_bytes() == Path("whole.png").read_bytes()
    assert run("ask", "in.png", "what is it?", "--model", f"sft,{model}")[0] == 0


def test_imagine_writes_what_was_asked(here, model):
    code, out, err = run("imagine", "a cat", "--size", "32x48", "--n", 3, "--seed", 5, "-o", "new/cat.png", "--model", model)
    assert (code, err) == (0, "") and sorted(files(here/"new")) == ["cat-1.png", "cat-2.png", "cat-3.png"] and out.count("wrote") == 3
    assert {Image.open(p).size for p in (here/"new").iterdir()} == {(48, 32)}
    assert len({p.read_bytes() for p in (here/"new").iterdir()}) == 3
    run("imagine", "a cat", "--size", "32x48", "--seed", 6, "-o", "again.png", "--model", model)
    assert Path("again.png").read_bytes() == (here/"new/cat-2.png").read_bytes(), "picture i of seed s is the picture of seed s + i"


@pytest.mark.parametrize("suffix", terminal.SUFFIXES)
def test_writes_the_format_of_the_suffix(suffix, here, model):
    assert run("reconstruct", "in.png", "-o", f"out{suffix}", "--zoom", 3, "--model", model)[0] == 0
    im = Image.open(f"out{suffix}")
    assert im.size == (144, 96) and suffix[1:3] in im.format.lower()


def test_names_of_its_own_where_none_is_given(here, model):
    for argv in (["imagine", "a cat"], ["edit", "in.png", "make it red"], ["reconstruct", "in.png"]): assert run(*argv, "--model", model)[0] == 0
    assert set(files(here)) == {"in.png", "imagined.png", "in-edited.png", "in-reconstructed.png"}


def test_may_replace_its_own_input(here, model):
    assert run("edit", "in.png", "make it red", "-o", "in.png", "--model", model)[0] == 0
    assert Image.open("in.png").size == RIGHT.size and Path("in.png").read_bytes() != encoded(RIGHT, "PNG")


def test_ask_answers_and_describes(here, model):
    for question in (["what color is the circle?"], []):
        code, out, err = run("ask", "in.png", *question, "--model", model)
        assert (code, err) == (0, "") and out.endswith("\n")


# ---- pictures that are refused ------------------------------------------------------------------------------------------------

CUT = {f: encoded(scene(2, (3, 3)).resize((300, 300)), f) for f in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")}
CUT |= {f"TIFF, {c}": encoded(scene(2, (3, 3)).resize((300, 300)), "TIFF", compression=c) for c in ("tiff_adobe_deflate", "tiff_lzw", "jpeg")} | {"TIFF, tiled": tiff(64, 128)}


@pytest.mark.parametrize("share", (.02, .3, .7, .95))
@pytest.mark.parametrize("format", CUT)
def test_refuses_truncated_pictures(format, share, here, capfd):
    Path("holiday").write_bytes(CUT[format][:int(len(CUT[format])*share)])
    for argv in (["ask", "holiday", "what is it?"], ["reconstruct", "holiday"], ["edit", "holiday", "make it red"]): assert re.search("cut off|not a picture", refused(here, *argv)) # a header that is cut is none
    assert capfd.readouterr().err == "" # decoders write past Python


def test_tiffs_leave_the_error_stream_as_it_was(here):
    from concurrent.futures import ThreadPoolExecutor

    from arm.data.pictures import open_picture
    data, before = [encoded(scene(k).resize((400, 400)), "TIFF", compression="tiff_lzw") for k in range(16)], os.fstat(2)
    with ThreadPoolExecutor(8) as pool: assert all(im.size == (400, 400) for im in pool.map(lambda d: open_picture(io.BytesIO(d)), data))
    assert (os.fstat(2).st_dev, os.fstat(2).st_ino) == (before.st_dev, before.st_ino)
    Path("ok.tif").write_bytes(data[0])
    Path("look.py").write_text("from arm.data.pictures import open_picture; print(open_picture('ok.tif').size)")
    assert subprocess.run(["sh", "-c", 'exec "$0" look.py 2>&-', sys.executable], capture_output=True, text=True).stdout == "(400, 400)\n"  # no error stream: the file itself may have its number
    with pytest.raises(ValueError, match="144,000,000 pixels"): open_picture(Image.open(io.BytesIO(tiff(32, 12_000))))  # opened by somebody else


@pytest.mark.parametrize("compression", ("tiff_adobe_deflate", "tiff_lzw", "jpeg"))
def test_a_damaged_tiff_is_refused_in_one_line(compression, here, capfd):
    data = bytearray(encoded(Image.effect_noise((200, 200), 80).convert("RGB"), "TIFF", compression=compression))
    data[len(data)//2:len(data)//2 + 200] = b"\xff"*200
    Path("bad.tiff").write_bytes(data)
    code, out, err = run("reconstruct", "bad.tiff")
    if compression != "jpeg": assert "damaged" in refusal(code, out, err) # JPEG paints grey over what it cannot read
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name, data", {"empty": b"", "letter.txt": b"Dear model,\n", "page.html": b"<!DOCTYPE html><p>", "zip.png": b"PK\x03\x04" + bytes(200), "zeros.jpg": bytes(5000),
                                        "script.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "vector.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"}.items())
def test_refuses_what_is_no_picture(name, data, here):
    Path(name).write_bytes(data)
    assert name in refused(here, "ask", name)


def test_refuses_paths_that_lead_nowhere(here):
    Path("folder").mkdir()
    for path, says in (("nowhere.png", "does not exist"), ("folder", "folder"), ("in.png/x.png", "does not exist"), ("x"*300, "does not exist"), ("/dev/null", "regular file")):
        assert says in refused(here, "ask", path)


@pytest.mark.parametrize("w, h", [(20_000, 20_000), (8_001, 8_000), (2**31 - 1, 1)])
def test_refuses_too_many_pixels(w, h, here):
    Path("bomb.png").write_bytes(png(w, h, 1, 0, None if w*h < 1e9 else b"", ))
    assert "pixels" in refused(here, "ask", "bomb.png")


def test_refuses_icons_by_what_they_wrap(here):
    bitmap = struct.pack("<IiiHHIIiiII", 40, 9000, 18_000, 1, 32, 0, 0, 0, 0, 0, 0)
    for inner, says in ((png(9000, 9000, 1, 0, b""), "81,000,000 pixels"), (bitmap, "81,000,000 pixels"), (encoded(RIGHT, "PNG")[:200], "cut off"), (encoded(RIGHT, "PNG")[:20], "cut off"), (bitmap[:20], "cut off"), (b"", "cut off")):
        Path("bomb.ico").write_bytes(icon(inner))
        assert says in refused(here, "ask", "bomb.ico")
    Path("bomb.ico").write_bytes(icon(b"")[:9])
    assert "cut off" in refused(here, "ask", "bomb.ico")


def late(data):
    "A PNG whose header is not its first piece."
    return data[:8] + chunk(b"tEXt", b"a\0b") + data[8:]


@pytest.mark.parametrize("wrapped", [lambda: png(20_000, 20_000, 1, 0), lambda: icon(png(13_000, 13_000, 8, 2)), lambda: icon(late(png(13_000, 13_000, 8, 2))), lambda: tiff(32, 12_000)], ids=["png", "icon", "icon with a late header", "tile"])
def test_a_bomb_costs_no_memory(wrapped, here, model):
    Path("bomb.png").write_bytes(wrapped())
    Path("letter.png").write_bytes(b"Dear model")
    used = {}
    for name in ("letter.png", "bomb.png"):
        child = subprocess.Popen([ARM, "ask", name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        err = child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.stdout.close(), child.stderr.close()
        refusal(os.waitstatus_to_exitcode(status), "", err)
        used[name] = usage.ru_maxrss*(1 if sys.platform == "darwin" else 1024)
    assert used["bomb.png"] - used["letter.png"] < 50e6, used  # its pixels are 400 MB and more


# ---- options that are refused -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", ["50x50", "8x4000", "4000x8", "0x0", "0x8", "-8x8", "8", "8x8x8", "bigxbig", "999999x999999", "", "8.5x8", "٨x٨"])
def test_refuses_sizes_that_no_shape_token_covers(size, here, model): assert "size" in refused(here, "imagine", "a cat", f"--size={size}", "--model", model)


@pytest.mark.parametrize("option", ["--n=0", "--n=-1", "--n=many", "--n=1e9", "--seed=-1", "--seed=x", "--seed=99999999999999999999", "--temperature=-1", "--temperature=1e-40", "--temperature=9e-7", "--temperature=nan", "--temperature=inf",
                                    "--top-k=-1", "--top-p=0", "--top-p=2", "--cfg-scale=nan", "--cfg-scale=-1", "--zoom=0", "--wings=2", "--device=toaster", "--device=cuda:99", "--device="])
def test_refuses_impossible_options(option, here, model): refused(here, "imagine", "a cat", option, "--model", model)


@pytest.mark.parametrize("argv", [["imagne", "cat"], ["imagine"], ["imagine", "a", "cat"], ["ask"], ["edit", "in.png"], ["reconstruct"], ["--wings"], ["eval", "--n", "0"], ["eval", "--worlds", "mars"],
                                  ["eval", "--json", "in.png/x.json"], ["demo", "--out", "in.png"], ["demo", "--seed", "one"]])
def test_refuses_words_that_make_no_command(argv, here): refused(here, *argv)


@pytest.mark.parametrize("out, says", [(".", "picture format"), ("sub", "picture format"), ("sub.png", "is a folder"), ("out.mp3", ".png"), ("out", ".png"), ("in.png/out.png", "no folder"),
                                       ("in.png/more/out.png", "no folder"), ("x"*300 + ".png", "name too long")])
def test_refuses_outputs_that_cannot_be_written(out, says, here, model):
    Path("sub.png").mkdir()
    Path("sub").mkdir()
    for argv in (["imagine", "a cat"], ["edit", "in.png", "make it red"], ["reconstruct", "in.png"]):
        assert says in refused(here, *argv, "-o", out, "--model", model)


def test_refuses_a_folder_without_permission(here, model, monkeypatch):
    Path("locked").mkdir(mode=0o555)
    if os.geteuid() == 0: monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "locked")  # root may write anywhere
    for argv in (["imagine", "a cat", "-o", "locked/out.png"], ["demo", "--out", "locked"], ["eval", "--json", "locked/s.json"]): assert "writable" in refused(here, *argv, "--model", model)


@pytest.fixture
def no_device(monkeypatch):
    "A test that fails must not replace a device of this machine."
    real = os.replace

    def replace(source, target):
        assert not os.path.realpath(target).startswith("/dev/"), f"{target} would have been replaced"
        real(source, target)
    monkeypatch.setattr(os, "replace", replace)


def test_devices_and_pipes_are_no_place_to_write_to(here, model, no_device):
    os.mkfifo("pipe.png")
    Path("null.png").symlink_to("/dev/null")
    Path("loop.png").symlink_to("loop.png")
    for out in ("pipe.png", "null.png", "loop.png"): assert "no regular file" in refused(here, "imagine", "a cat", "-o", out, "--model", model)
    for out in ("/dev/null", "pipe.png"):
        for argv in (["eval", "--n", 2, "--worlds", "shapes", "--json", out], ["bench", "encoding", "--repeats", 1, "--json", out], ["report", model, "-o", out]): assert "no regular file" in refused(here, *argv)
    assert Path("pipe.png").is_fifo() and Path("/dev/null").is_char_device() and Path("null.png").is_symlink()


def test_a_link_stays_and_what_it_leads_to_is_replaced(here, model):
    Path("album").mkdir()
    RIGHT.save("album/a.png")
    Path("link.png").symlink_to("album/a.png")
    Path("new.png").symlink_to("album/b.png")
    for link in ("link.png", "new.png"): assert run("imagine", "a cat", "-o", link, "--model", model)[0] == 0
    assert Path("link.png").is_symlink() and Path("new.png").is_symlink()
    assert Image.open("album/a.png").size == Image.open("album/b.png").size == (48, 48) and len(files(here/"album")) == 2


def test_a_locked_file_is_not_replaced(here, model, monkeypatch):
    RIGHT.save("kept.png")
    Path("kept.png").chmod(0o444)
    if os.geteuid() == 0: monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "kept.png")  # root may write everything
    assert "read-only" in refused(here, "imagine", "a cat", "-o", "kept.png", "--model", model)
    assert "read-only" in refused(here, "eval", "--json", "kept.png", "--model", model)
    with pytest.raises(ValueError, match="read-only"): atomic_write("kept.png", "x")


@pytest.mark.parametrize("argv", [["imagine", "a cat", "-o", ""], ["edit", "in.png", "make it red", "-o", ""], ["reconstruct", "in.png", "-o", ""], ["eval", "--json", ""], ["bench", "--json", ""],
                                  ["eval", "pope", "--data", "in.png", "--out", ""], ["demo", "--out", ""], ["report", "in.png", "-o", ""], ["train", "arm", "--out", ""]])
def test_an_empty_name_is_no_place(argv, here): assert "is empty" in refused(here, *argv)


def test_every_name_of_several_pictures_is_checked_before_the_work(here, model, monkeypatch):
    Path("out-2.png").mkdir()
    monkeypatch.setattr("arm.app.cli.load_model", lambda *_, **__: pytest.fail("the model was loaded before the names were checked"))
    for argv in (["imagine", "a cat"], ["edit", "in.png", "make it red"]): assert "out-2.png is a folder" in refused(here, *argv, "--n", 3, "-o", "out.png", "--model", model)
    assert "name too long" in refused(here, "imagine", "a cat", "--n", 2, "-o", "x"*251 + ".png", "--model", model)


def test_writes_every_name_that_the_file_system_takes(here, model):
    for name in ("円"*80 + ".png", "x"*251 + ".png", "a." + "x"*249 + ".png"):
        assert run("imagine", "a cat", "-o", name, "--model", model)[0] == 0 and Image.open(name).size == (48, 48)
    name = "s." + "x"*253  # all of it is suffix
    atomic_write(name, "{}")
    assert Path(name).read_text() == "{}" and not [p for p in files(here) if p.startswith(".tmp")]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("cannot"), KeyboardInterrupt()])
def test_leaves_no_half_written_file(error, here, model, monkeypatch):
    def save(im, path, *_, **__):
        Path(path).write_bytes(b"half")
        raise error
    monkeypatch.setattr(Image.Image, "save", save)
    before = files(here)
    for argv in (["imagine", "a cat", "-o", "out.png"], ["edit", "in.png", "make it red", "-o", "in.png"], ["imagine", "a cat", "--n", "2", "-o", "out.png"]):
        code, out, err = run(*argv, "--model", model)
        assert code == (130 if isinstance(error, KeyboardInterrupt) else 2) and err.startswith("arm: ") and err.count("\n") == 1
        assert files(here) == before


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)"),
                                   torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")])
def test_too_little_memory_is_one_line(error, here, model, monkeypatch):
    def full(*_, **__): raise error
    for where, argv in (("arm.app.cli.load_model", ["imagine", "a cat"]), ("arm.model.tasks.generate_images", ["imagine", "a cat"]), ("arm.data.pictures._decode", ["reconstruct", "in.png"])):
        with monkeypatch.context() as patch:
            patch.setattr(where, full)
            assert "memory" in refused(here, *argv, "--model", model)


def test_other_failures_of_ours_keep_their_traceback(here, model, monkeypatch):
    def broken(*_, **__): raise RuntimeError("shapes cannot be multiplied")
    monkeypatch.setattr("arm.model.tasks.generate_images", broken)
    with pytest.raises(RuntimeError, match="multiplied"): run("imagine", "a cat", "--model", model)


def test_large_pictures_are_painted_a_few_at_a_time(model, monkeypatch):
    arm, seen = terminal.load_model(model), []
    codes = [(torch.randint(65_536, (144,), generator=torch.Generator().manual_seed(s)), (12, 12)) for s in range(20)]
    paint, look = arm.tokenizer.decode, arm.tokenizer.encode
    monkeypatch.setattr(arm.tokenizer, "decode", lambda indices, *more: seen.append(len(indices)) or paint(indices, *more))
    monkeypatch.setattr(arm.tokenizer, "encode", lambda images: seen.append(len(images)) or look(images))
    painted = arm.decode(codes)
    assert seen == [16, 4] and len(arm.encode(painted)) == 20 and seen == [16, 4, 16, 4]
    assert all(torch.allclose(x, arm.decode([c])[0], atol=1e-5) for x, c in zip(painted, codes))
    seen.clear()
    arm.decode([(torch.zeros(36, dtype=torch.long), (6, 6))]*300)
    assert seen == [256, 44]
    seen.clear()
    monkeypatch.setattr(arm.tokenizer, "decode", lambda indices, grid, steps: seen.append(len(indices)) or torch.zeros(len(indices), 3, 512, 512))
    arm.decode([(torch.zeros(4096, dtype=torch.long), (64, 64))]*3)
    assert seen == [1, 1, 1]


# ---- model folders ------------------------------------------------------------------------------------------------------------

def change(**fields):
    "An edit of config.json: a value by its dotted name."
    def apply(folder):
        config = json.loads((folder/"config.json").read_text())
        for name, value in fields.items():
            *path, last = name.split("__")
            at = config
            for p in path: at = at[p]
            at[last] = value
        (folder/"config.json").write_text(json.dumps(config))
    return apply


def write(name, data): return lambda folder: (folder/name).write_bytes(data)
def remove(name): return lambda folder: (folder/name).unlink()


def cut(name, share): return lambda folder: (folder/name).write_bytes((folder/name).read_bytes()[:int(share*(folder/name).stat().st_size)])


def swap(folder):
    weights = (folder/"arm.safetensors").read_bytes()
    (folder/"arm.safetensors").write_bytes((folder/"tokenizer.safetensors").read_bytes())
    (folder/"tokenizer.safetensors").write_bytes(weights)


DAMAGE = {
    "empty": lambda folder: [p.unlink() for p in folder.iterdir()],
    "foreign": write("config.json", b'{"architectures": ["Qwen2ForCausalLM"], "hidden_size": 64}'),
    "config missing": remove("config.json"), "config cut": cut("config.json", .5), "config empty": write("config.json", b""), "config binary": write("config.json", bytes(range(256))),
    "config list": write("config.json", b"[1, 2]"), "config null": write("config.json", b"null"), "deeply nested": write("config.json", b"["*100_000),
    "no arm": change(arm=None), "no tokenizer": change(tokenizer={}), "card list": change(card=[1]), "card grids": change(card__grids=[]), "card grids text": change(card__grids="wide"),
    "card grids zero": change(card__grids=[[0, 4]]), "card prompt": change(card__max_prompt="long"),
    "format": change(format=99), "unknown field": change(arm__wings=2), "unknown field below": change(tokenizer__decoder__wings=2), "text for a number": change(arm__dim="wide"), "float for int": change(arm__n_layer=2.5),
    "true for int": change(arm__n_layer=True), "negative": change(arm__dim=-256), "zero heads": change(arm__n_head=0), "heads do not divide": change(arm__n_head=7), "zero layers": change(arm__n_layer=0),
    "huge": change(arm__dim=10**15), "deep": change(tokenizer__up_layer=10**15), "deep decoder": change(tokenizer__decoder__n_layer=10**15), "many blocks": change(tokenizer__up_layer=900), "wide and deep": change(arm__dim=16_384, arm__n_head=64, arm__n_kv_head=64, arm__n_layer=900),
    "wide decoder": change(tokenizer__decoder__dim=32_768, tokenizer__decoder__n_layer=900), "other width": change(arm__dim=128), "other depth": change(arm__n_layer=5), "zero patch": change(tokenizer__patch_size=0), "negative patch": change(tokenizer__patch_size=-8),
    "no levels": change(tokenizer__levels=[]), "level of 1": change(tokenizer__levels=[1]*16), "other source": change(tokenizer__source="dreams"), "nan": change(arm__rope_theta=float("nan")), "zero theta": change(arm__rope_theta=0),
    "zero eps": change(arm__norm_eps=-1.0), "weights missing": remove("arm.safetensors"), "weights cut": cut("arm.safetensors", .5), "weights cut in the header": cut("arm.safetensors", .0001),
    "weights empty": write("arm.safetensors", b""), "weights text": write("tokenizer.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "pickle": write("arm.safetensors", b"\x80\x02}q\x00."),
    "weights swapped": swap, "tokenizer missing": remove("tokenizer.safetensors"), "text missing": remove("text.json"), "text cut": cut("text.json", .5), "text foreign": write("text.json", b'{"a": 1}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_refuses_damaged_and_foreign_models(damage, here, model):
    shutil.copytree(model, "copy")
    DAMAGE[damage](here/"copy")
    for argv in (["imagine", "a cat"], ["ask", "in.png", "what is it?"]): refused(here, *argv, "--model", "copy")


def test_a_refusal_names_the_folder_and_the_fix(here, model):
    shutil.copytree(model, "m")
    change(arm__wings=2)(here/"m")
    line = refused(here, "imagine", "a cat", "--model", "m")
    assert "m makes no model" in line and "copy the folder again" in line


def test_refuses_models_that_are_not_there(here):
    for path in ("nowhere", "in.png", "", "\0"): assert "model folder" in refused(here, "imagine", "a cat", "--model", path)


# ---- training -----------------------------------------------------------------------------------------------------------------

CONFIGS = {"unknown field": "wings: 2\n", "not yaml": "steps: [1\n", "a list": "- 1\n", "a word": "steps", "wrong type": "steps: many\n", "below zero": "steps: -5\n", "binary": "\x00\x01", "nested": "steps: {a: 1}\n"}


@pytest.mark.parametrize("stage", ["arm", "sft", "grpo"])
@pytest.mark.parametrize("name", CONFIGS)
def test_refuses_training_files_with_unknown_or_impossible_fields(name, stage, here):
    Path("run.yaml").write_text(CONFIGS[name])
    refused(here, "train", stage, "--out", "runs", "--config", "run.yaml")


@pytest.mark.parametrize("option", ["--worn=7", "--plan=1.5", "--hold=7", "--hold=nan", "--lr=0", "--lr=inf", "--lr=nan", "--questions=0", "--questions=inf", "--steps=0", "--batch=0", "--scenes=0", "--every=0"])
def test_refuses_impossible_numbers_of_fine_tuning(option, here):
    assert option[2:].split("=")[0] in refused(here, "train", "sft", "--out", "runs", option)


@pytest.mark.parametrize("option", ["--lr=0", "--lr=inf", "--lr=nan", "--beta=-1", "--steps=0", "--num_generations=1"])
def test_refuses_impossible_numbers_of_reinforcement(option, here):
    assert option[2:].split("=")[0] in refused(here, "train", "grpo", "--out", "runs", option)


@pytest.mark.parametrize("stage", ["teacher", "tokenizer", "decoder", "arm", "all", "renderers", "sft", "codes"])
def test_refuses_to_train_on_a_device_that_is_not_there(stage, here):
    assert "'toaster' is not available here" in refused(here, "train", stage, "--out", "runs/new", "--device", "toaster") and not Path("runs").exists()


@pytest.mark.parametrize("argv", [[], ["nothing"], ["arm", "--steps", "many"], ["arm", "--steps", "-3"], ["arm", "--wings", "2"], ["arm", "--config", "nowhere.yaml"], ["arm", "--out", "in.png"],
                                  ["arm", "--out", "in.png/runs"], ["all", "--quick", "perhaps"], ["arm", "--out", "empty"], ["decoder", "--out", "empty"], ["tokenizer", "--out", "empty", "--quick"], ["renderers", "--out", "empty"],
                                  ["renderers", "--wings", "2"]])
def test_refuses_training_that_cannot_start(argv, here): refused(here, "train", *argv)


def test_training_reads_its_settings_from_flags_and_files(here, monkeypatch):
    from arm.train import run as stages
    seen = []
    def train_arm(
        out: str = "runs/tiny", # run folder
        quick: bool = False, # the short run
        steps: int = 0, # length
    ): "Stage 4."; seen.append((out, quick, steps))
    monkeypatch.setattr(stages, "train_arm", train_arm)
    Path("run.yaml").write_text("steps: 7\nout: there\n")
    for argv in (["arm", "--steps", "10", "--out", "here"], ["arm", "--quick"], ["arm", "--quick", "--steps=3"], ["arm", "--quick", "false"], ["arm", "--config", "run.yaml", "--steps", "8"]):
        assert run("train", *argv)[0] == 0
    assert seen == [("here", False, 10), ("runs/tiny", True, 0), ("runs/tiny", True, 3), ("runs/tiny", False, 0), ("there", False, 8)]


def test_training_prints_its_settings_and_explains_them(here):
    code, out, err = run("train", "arm", "--steps", "10", "--print_config")
    assert (code, err) == (0, "") and "steps: 10" in out and "quick: false" in out
    Path("run.yaml").write_text(out)
    assert run("train", "arm", "--config", "run.yaml", "--print_config")[1] == out
    for argv, says in ((["train", "--help"], "all"), (["train", "arm", "--help"], "run folder")):
        code, out, err = run(*argv)
        assert (code, err) == (0, "") and says in out


# ---- studies ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv", [[], ["speed"], [""], ["bits", "more"], ["bits", "--seeds", "0"], ["bits", "--seeds", "many"], ["bits", "--steps", "-1"], ["bits", "--steps", "1.5"], ["bits", "--wings", "2"],
                                  ["bits", "--out", "in.png"], ["bits", "--out", "in.png/runs"]])
def test_refuses_studies_that_cannot_start(argv, here): refused(here, "study", *argv)


def test_studies_get_what_was_typed_and_the_help_knows_them_all(here, monkeypatch):
    from arm.app import study as module
    seen = []
    monkeypatch.setattr(module, "study", lambda *args: seen.append(args))
    for argv in (["bits"], ["bits", "--out", "there", "--seeds", "1", "--steps=20"], ["transfer", "--start", "runs/mine", "--record", "kept"]): assert run("study", *argv) == (0, "", "")
    assert seen == [("bits", "runs/studies", 3, 0, "", ""), ("bits", "there", 1, 20, "", ""), ("transfer", "runs/studies", 3, 0, "runs/mine", "kept")]
    told = "".join(run("study", "--help")[1].split())  # lines break within names
    assert all(name in told for name in module.STUDIES)


def test_a_study_goes_on_and_a_finished_one_is_left_alone(here, monkeypatch):
    from arm.app import study as module
    from arm.core import load_json, save_json
    from arm.train.study import Study, row_folder
    trained = []

    @dataclass(kw_only=True, frozen=True)
    class Toy:
        width: int = 1
        steps: int = 100
        def shorter(self, steps): return replace(self, steps=steps)

    def row(config, seed, folder, score):
        note = row_folder(config, seed, folder)/"row.json"
        if note.exists(): return load_json(note)["row"]
        trained.append(config.width)
        if len(trained) == 2: raise KeyboardInterrupt
        save_json(note, dict(row={"score": 1.}, points=[]))
        return {"score": 1.}

    monkeypatch.setattr(module, "STUDIES", {"toy": Study(question="Is it wide?", variants={"base": Toy(), "wide": Toy(width=2)}, row=row)})
    monkeypatch.setattr(module, "SCORES", {"tokenizer": lambda: None})
    argv = ("study", "toy", "--out", "runs", "--seeds", "1", "--steps", "5")
    code, _, err = run(*argv)
    assert code == 130 and err.endswith("arm: interrupted\n") and not Path("runs/toy/trial-5x1.csv").exists()
    code, out, _ = run(*argv)
    assert code == 0 and "2 rows in runs/toy/trial-5x1.csv" in out
    before = files(here)
    code, out, _ = run(*argv)
    assert code == 0 and "is finished and stays as it is" in out and files(here) == before and trained == [1, 2, 2]
    code, out, _ = run("study", "toy", "--out", "runs", "--record", "mine")
    assert code == 0 and "6 rows in mine/toy.csv" in out and Path("mine/toy.csv").is_file()


# ---- help, scores, demo -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["gqa", "vqav2", "seed", "mmmu", "pope", "mme", "mmbench"])
def test_files_of_another_benchmark_are_refused_in_one_line(name, tmp_path):
    for k, text in enumerate(('[{"question_id": 1, "odd": [2]}]', '{"a": {"b": 1}}', '{"question_id": 1}\n{"question_id": 2}\n')):
        (tmp_path/f"{k}.json").write_text(text)
        for paths in ([f"{k}.json"], [f"{k}.json", "0.json"], ["1.json", f"{k}.json"]):
            refusal(*run("score", name, *(tmp_path/p for p in paths)))


def test_a_benchmark_without_its_pictures_has_no_score(tmp_path):
    argv = ("eval", "pope", "--data", tmp_path/"pope.json", "--images", tmp_path/"pictures", "--out", tmp_path/"run", "--json", tmp_path/"result.json")
    (tmp_path/"pope.json").write_text("\n".join(json.dumps({"question_id": i, "image": f"{i}.jpg", "text": "Is there a dog in the image?", "label": "yes"}) for i in range(3)))
    (tmp_path/"pictures").mkdir()
    code, _, err = run(*argv)
    assert code == 2 and "all 3 questions were refused" in err and not (tmp_path/"result.json").exists()
    Image.new("RGB", (48, 48), "white").save(tmp_path/"pictures"/"0.jpg")
    code, out, _ = run(*argv)
    assert code == 0 and "2 of 3 questions have no answer" in out
    assert not json.loads((tmp_path/"result.json").read_text())["complete"]


COMMANDS = ["imagine", "edit", "ask", "reconstruct", "train", "eval", "demo", "study", "plan", "score", "recipe", "report", "shards", "weights", "app", "bench", "compare"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command):
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "") and f"examples:\n  arm {command}" in out


@pytest.mark.parametrize("stage", ["teacher", "all", "grpo", "codes"])
def test_help_of_a_stage_has_an_example(stage):
    code, out, err = run("train", stage, "--help")
    assert (code, err) == (0, "") and f"example: arm train {stage} --" in " ".join(out.split())
    assert stage in run("train", "--help")[1]


def test_help_lists_all_commands():
    for argv in (["--help"], []):
        code, out, _ = run(*argv)
        assert code == 0 and all(re.search(rf"^ +{name}\b", out, re.M) for name in COMMANDS) and set(re.findall(r"^    ([a-z]+)\b", out, re.M)) == set(COMMANDS)


def test_help_waits_for_no_library():
    code = "import sys; from arm.app.cli import main; main(['imagine', '--help']); sys.exit(bool({'torch', 'numpy', 'PIL', 'lightning', 'gradio'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_compare_holds_two_models_against_each_other(here, model):
    code, out, err = run("compare", model, model, "--n", "2", "--worlds", "shapes", "--temperatures", "1", "0", "--json", "new/compared.json")
    assert code == 0 and "| shapes/edit | greedy |" in out and "before, temperature 1" in err
    found = json.loads(Path("new/compared.json").read_text())
    assert set(found) == {"shapes/t2i", "shapes/t2i_unseen", "shapes/edit"} and all(d["value"] == 0 == d["gained"] for f in found.values() for d in f["equal"].values()), "a model is as good as itself"
    for wrong in (["--temperatures", "-1"], ["--temperatures", "1", "1"], ["--n", "0"], ["--worlds", "mars"], ["--device", "toaster"]): refused(here, "compare", model, model, "--n", "2", *wrong)


def test_eval_prints_and_writes_scores(here, model):
    code, out, err = run("eval", "--n", "2", "--worlds", "shapes", "--json", "new/scores.json", "--model", model)
    assert code == 0, err
    scores = json.loads(Path("new/scores.json").read_text())
    assert scores["shapes/t2i/strict/greedy"].keys() == {"value", "low", "high", "n"} and "95 % interval" in out and not [k for k in scores if k.startswith("openmoji")]


class Links(HTMLParser):
    "Everything that a page loads."
    def __init__(self): super().__init__(); self.loads, self.tags = [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loads += [v for k, v in attrs if k in ("src", "srcset", "data", "poster") or k == "href" and tag != "a"]


def test_demo_writes_a_report_that_needs_no_other_file(here, model):
    code, out, err = run("demo", "--model", model, "--out", "new/demo")
    assert code == 0 and set(files(here/"new/demo")) == {"report.html", "contact_sheet.png"}
    assert "new/demo/report.html" in out and "new/demo/contact_sheet.png" in out
    page, links = Path("new/demo/report.html").read_text(), Links()
    links.feed(page)
    assert len(links.loads) > 100 and all(v.startswith("data:image/png;base64,") for v in links.loads) and not links.tags & {"script", "iframe", "object"} and "url(" not in page and "@import" not in page
    assert "OpenMoji" in page and "CC BY-SA 4.0" in page and 'name="viewport"' in page and page.isprintable() is False
    sheet = Image.open("new/demo/contact_sheet.png")
    sheet.load()
    assert sheet.width > 1000 and Path("new/demo/contact_sheet.png").stat().st_size < 2e6


# ---- as real processes --------------------------------------------------------------------------------------------------------

def test_a_terminal_without_letters_gets_codes(here, model):
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([ARM, "ask", "нет.png"], capture_output=True, env=env)
    assert (done.returncode, done.stdout) == (2, b"") and done.stderr.startswith(b"arm: \\u043d") and done.stderr.count(b"\n") == 1
    done = subprocess.run([ARM, "imagine", b"\xff\xfe", "--model", str(model)], capture_output=True, env=env)
    assert done.returncode == 2 and b"UTF-8" in done.stderr and done.stderr.count(b"\n") == 1


def test_the_command_is_installed(here, model):
    assert subprocess.run([ARM, "--version"], capture_output=True, text=True, check=True).stdout.startswith("arm 0.")
    done = subprocess.run([ARM, "imagine", "红色的圆", "-o", "out.png", "--model", str(model)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stderr == "" and Image.open("out.png").size == (48, 48)


@pytest.mark.parametrize("words, said", [
    (["pope", "--data", "x.jsonl", "--n", "20"], "--n: of our own examination"), (["--data", "x.jsonl", "--images", "d"], "--data, --images: of a benchmark, and none is named"),
    (["--renderers", "d", "--worlds", "shapes"], "leave --worlds out")])
def test_options_of_the_other_form_of_eval_are_refused(words, said, capsys):
    assert main(["eval", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_question_file_of_another_benchmark_is_one_line(tmp_path, capsys):
    (tmp_path/"x.jsonl").write_text('{"a": 1}\n')
    assert main(["eval", "pope", "--data", str(tmp_path/"x.jsonl"), "--images", str(tmp_path), "--out", str(tmp_path/"run")]) == 2
    assert "not the files of pope" in capsys.readouterr().err
    (tmp_path/"e.json").write_text("{}")
    (tmp_path/"d.json").write_text("[" * 100_000)
    for name, file in (("mmmu", "e.json"), ("gqa", "d.json")):
        assert main(["score", name, *[str(tmp_path/file)] * 2]) == 2
        err = capsys.readouterr().err
        assert err.startswith("arm: ") and err.count("\n") == 1


def test_options_of_writing_shards_are_refused_where_nothing_is_written(tmp_path, capsys):
    assert main(["shards", "check", str(tmp_path), "--samples", "5"]) == 2
    assert "leave them out of: arm shards check" in capsys.readouterr().err
