"""Input from strangers: a model to refuse it, files of every kind, and one way to call the command line."""
import contextlib
import io
import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from arm.app.cli import main
from arm.core import make_rng, seeded, to_pil
from arm.data.shapes import render, sample_scene


def run(*argv: str) -> tuple[int, str, str]:
    "Exit code, output and error stream of a command; anything but an exit code fails the test."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = main([str(a) for a in argv])
    return code, out.getvalue(), err.getvalue()


def refusal(code: int, out: str, err: str) -> str:
    "The one line of a refusal; anything else fails the test."
    assert (code, out) == (2, ""), (code, out, err)
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("arm: ") and err.endswith("\n"), err
    assert "Traceback" not in err and len(lines[0]) > 25 and re.search(r"[;:]", lines[0][5:]), f"what, the rule, the fix: {err}"
    return lines[0]


def files(folder: Path) -> dict[str, bytes]:
    "Every file in a folder, and what is in it."
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def untrained(folder: Path) -> Path:
    "A small model folder with random weights."
    from arm.data.text import default_tokenizer
    from arm.model.tasks import Arm
    from arm.model.transformer import ARM, ARMConfig
    from arm.tokenizer.decoder import DecoderConfig
    from arm.tokenizer.model import TokenizerConfig, VisualTokenizer
    decoder = replace(DecoderConfig.tiny(), dim=64, n_layer=1, n_head=2)
    with seeded(0, "untrained"):
        tokenizer = VisualTokenizer(replace(TokenizerConfig.tiny(), down_dim=64, up_dim=64, up_layer=1, feature_dim=32, reader_dim=32, decoder=decoder))
        model = ARM(replace(ARMConfig.tiny(), dim=64, n_layer=2, n_head=4, n_kv_head=2, ffn_dim=96))
    Arm(tokenizer, model, default_tokenizer()).save_pretrained(folder)
    return Path(folder)


def scene(seed: int = 0, canvas: tuple[int, int] = (2, 3)) -> Image.Image:
    "A true picture of a size that the model knows."
    return to_pil(render(sample_scene(make_rng(seed, "strangers"), canvas=canvas, n_objects=4)))


def encoded(im: Image.Image, format: str, **options) -> bytes:
    "A picture as the bytes of a file."
    buffer = io.BytesIO()
    im.save(buffer, format, **options)
    return buffer.getvalue()


def note(orientation: int) -> Image.Exif:
    "An EXIF note that asks for a turn."
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def chunk(kind: bytes, data: bytes) -> bytes: return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(w: int, h: int, bits: int, color: int, rows: bytes | None = None, extra: bytes = b"") -> bytes:
    "A PNG by hand: black where no rows are given, made without holding its pixels."
    pack, line = zlib.compressobj(9), b"\0"*(1 + (w*bits*{0: 1, 2: 3, 4: 2, 6: 4}[color] + 7)//8)
    data = zlib.compress(rows) if rows is not None else b"".join(pack.compress(line) for _ in range(h)) + pack.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, bits, color, 0, 0, 0)) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def icon(inner: bytes, side: int = 32) -> bytes:
    "An icon around the bytes of a picture, of the size that it states itself."
    return struct.pack("<3H4B2H2I", 0, 1, 1, side, side, 0, 0, 1, 32, len(inner), 22) + inner


def png16(levels: np.ndarray) -> bytes:
    "A picture of 16 bits per channel, from (H, W, 2, 3 or 4) numbers up to 65,535: grey and opacity, RGB, RGB and opacity."
    h, w, channels = levels.shape
    return png(w, h, 16, {2: 4, 3: 2, 4: 6}[channels], b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels))


def tiff(side: int, tile: int) -> bytes:
    "A black TIFF of one deflated tile, which may be far larger than the picture; made without holding its pixels."
    pack, row = zlib.compressobj(9), bytes(tile)
    data = b"".join(pack.compress(row) for _ in range(tile)) + pack.flush()
    tags = {256: side, 257: side, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: 8 + 2 + 10*12 + 4, 325: len(data)}
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()) + bytes(4) + data
