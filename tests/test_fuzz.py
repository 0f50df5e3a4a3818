"""Random bytes, modes, sizes, words and settings: whatever comes, the command line ends with exit code 0, or 2 and one line."""
import io
import json
import shutil
from functools import lru_cache

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from tools.strangers import encoded, note, refusal, run, scene, untrained

from arm.app import cli


def often(n): return settings(max_examples=n, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return untrained(tmp_path_factory.mktemp("untrained"))


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        scene().save("in.png")
        yield patch


@pytest.fixture
def loaded(folder, monkeypatch):
    "The model is loaded once; loading has a fuzz of its own below."
    model = loaded_once(folder)
    monkeypatch.setattr(cli, "load_model", lambda path, device="cpu", plan=None: model)


loaded_once = lru_cache(cli.load_model)


def check(*argv) -> int:
    code, out, err = run(*argv)
    if code: refusal(code, out, err)
    return code


FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "JPEG2000", "AVIF", "PCX", "SGI", "QOI")
WHOLE = [encoded(scene(k), f, **({"exif": note(6)} if f in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else {})) for k, f in enumerate(FORMATS) if Image.registered_extensions() and f in Image.SAVE]
WHOLE += [encoded(scene(k), "TIFF", compression=c) for k, c in enumerate(("tiff_adobe_deflate", "tiff_lzw"))]


@st.composite
def damaged(draw):
    "A whole file with some bytes changed, doubled, dropped or cut off."
    data = bytearray(draw(st.sampled_from(WHOLE)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, min(len(data) - 1, draw(st.sampled_from((40, 400, 10**6))))))
        how = draw(st.sampled_from(("set", "set", "insert", "drop", "cut")))
        if how == "set": data[at] = draw(st.integers(0, 255))
        elif how == "insert": data[at:at] = draw(st.binary(max_size=20))
        elif how == "drop": del data[at:at + draw(st.integers(1, 30))]
        else: del data[at:]
        if not data: break
    return bytes(data)


@often(400)
@given(st.one_of(st.binary(max_size=300), damaged(), damaged(), damaged(), st.builds(lambda head, rest: head[:32] + rest, st.sampled_from(WHOLE), st.binary(max_size=300))))
def test_bytes(loaded, data):
    with open("any.png", "wb") as f: f.write(data)
    check("reconstruct", "any.png", "-o", "out.png")


MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX", "RGBa", "La", "I;16")


@often(200)
@given(st.sampled_from(MODES), st.sampled_from(FORMATS), st.integers(1, 200), st.integers(1, 200), st.integers(0, 9), st.booleans())
def test_modes_and_sizes(loaded, mode, format, w, h, orientation, clear):
    im, options = Image.new(mode, (w, h)), {"exif": note(orientation)}
    if clear and mode in ("L", "P", "RGB", "1"): options["transparency"] = (0, 0, 0) if mode == "RGB" else 0
    try: data = encoded(im, format, **options)
    except Exception: return  # this format has no such mode
    try: Image.open(io.BytesIO(data)).load()
    except Exception: return  # Pillow 12 writes icons without an icon and YCbCr in TIFF that it cannot read back: what it reads, we read
    with open("any.png", "wb") as f: f.write(data)
    assert check("reconstruct", "any.png", "-o", "out.png") == 0


@often(100)
@given(st.sampled_from(MODES), st.integers(1, 200), st.integers(1, 200))
def test_modes_from_python(mode, w, h):
    from arm.data.pictures import open_picture
    assert open_picture(Image.new(mode, (w, h))).mode == "RGB"


WORDS = st.text(st.characters(codec=None), max_size=60)  # lone surrogates too: how Python shows bytes that are no UTF-8


@often(80)
@given(WORDS)
def test_prompts(loaded, words):
    check("imagine", "--size", "8x8", "-o", "out.png", "--", words)
    check("ask", "--", "in.png", words)


PIECES = st.one_of(WORDS, st.sampled_from(("imagine", "edit", "ask", "reconstruct", "in.png", "a cat", "-o", "--out", "out.png", "--n", "--seed", "--size", "8x8", "--zoom", "--temperature", "--top-k", "--top-p",
                                           "--cfg-scale", "--text-scale", "--image-scale", "--model", "--device", "cpu", "--", "-", "--help", "--version", "0", "1", "-1", "2", "1e9", "1e-40", "nan", "inf", "@in.png", "--n=2", "")))


@often(400)
@given(st.lists(PIECES, max_size=8))
def test_arguments(loaded, argv):
    if argv[:1] and argv[0] in ("train", "eval", "demo"): return
    check(*argv)


@often(25)
@given(st.one_of(st.text(max_size=60), st.builds(lambda d: json.dumps(d), st.dictionaries(st.sampled_from(("steps", "out", "quick", "wings", "config")), st.recursive(st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.floats(), st.text(max_size=5)), lambda c: st.lists(c, max_size=2), max_leaves=3), max_size=3))))
def test_training_files(text):
    with open("run.yaml", "w", encoding="utf-8", errors="replace") as f: f.write(text)
    check("train", "arm", "--config", "run.yaml", "--print_config")


def leaves(at, path=()):
    "Every field of the settings, by the keys that lead to it."
    yield path
    for k, v in (at.items() if isinstance(at, dict) else enumerate(at) if isinstance(at, list) else ()): yield from leaves(v, (*path, k))


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-3, 40), st.sampled_from((10**15, 10**400, 2.5, float("nan"), float("inf"), -0.0, "", "x", [], {}, [1], {"a": 1}, [[0, 0]], [[4]])), st.text(max_size=3))


@often(80)
@given(st.data())
def test_settings(folder, data):
    config = json.loads((folder/"config.json").read_text())
    path = data.draw(st.sampled_from([p for p in leaves(config) if p]))
    at = config
    for k in path[:-1]: at = at[k]
    at[path[-1]] = data.draw(VALUES)
    shutil.copytree(folder, "copy", dirs_exist_ok=True)
    with open("copy/config.json", "w") as f: json.dump(config, f)
    check("ask", "in.png", "what is it?", "--model", "copy")


@often(40)
@given(st.sampled_from(("config.json", "text.json", "arm.safetensors", "tokenizer.safetensors")), st.one_of(st.binary(max_size=100), st.integers(0, 10**6), st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=5)))
def test_model_files(folder, name, damage):
    shutil.copytree(folder, "copy", dirs_exist_ok=True)
    data = bytearray((folder/name).read_bytes())
    if isinstance(damage, bytes): data = damage
    elif isinstance(damage, int): del data[damage % len(data):]
    else:
        for at, value in damage: data[at % len(data)] = value
    with open(f"copy/{name}", "wb") as f: f.write(data)
    check("ask", "in.png", "what is it?", "--model", "copy")


def test_the_fuzz_has_something_to_damage(): assert len(WHOLE) > 8 and all(Image.open(io.BytesIO(data)).load() for data in WHOLE)
