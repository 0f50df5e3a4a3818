"What the pages on shapes cannot show: the split over many scenes, and the same world in another process."
import hashlib
import os
import subprocess
import sys
from dataclasses import replace

from arm.core import make_rng
from arm.data.shapes import HELD_OUT, SPLITS, render, sample_scene, split_of
from arm.data.shapetasks import edit, questions
from arm.data.shapetext import caption

MANY = 20_000
FINGERPRINT = """
import hashlib
from arm.core import make_rng
from arm.data.shapes import SPLITS, render, sample_scene
from arm.data.shapetasks import edit, questions
from arm.data.shapetext import caption
rng, digest = make_rng(7, "fingerprint"), hashlib.sha256()
for i in range(300):
    scene = sample_scene(rng, split=SPLITS[i % 3])
    digest.update(render(scene).numpy().tobytes())
    digest.update(repr((caption(scene, rng), questions(scene, rng), edit(scene, rng))).encode())
print(digest.hexdigest())
"""


def moved(scene, dy, dx): return replace(scene, objs=tuple(replace(o, dy=dy, dx=dx) for o in scene.objs))


def test_splits_share_no_scene_and_no_picture():
    rng = make_rng(0, "disjoint")
    pictures, contents = {}, {}
    for split in SPLITS:
        scenes = [sample_scene(rng, split=split) for _ in range(MANY)]
        assert all(split_of(s) == split for s in scenes)
        assert all(split_of(moved(s, 1, -1)) == split for s in scenes[:1000])
        contents[split] = {moved(s, 0, 0) for s in scenes}
        pictures[split] = {hashlib.sha1(bytes(s.shape) + s.numpy().tobytes()).digest() for s in map(render, scenes)}
    for a, b in (("train", "val"), ("train", "unseen"), ("val", "unseen")):
        assert not contents[a] & contents[b] and not pictures[a] & pictures[b]
    assert len(contents["train"]) > .75 * MANY


def test_training_never_says_or_shows_a_held_out_pair():
    rng = make_rng(0, "held out")
    for _ in range(MANY):
        scene = sample_scene(rng)
        texts = [caption(scene, rng).text, *(qa.question for qa in questions(scene, rng, ["count", "exist"]))]
        if found := edit(scene, rng):
            assert split_of(found.target) == "train"
            texts.append(found.instruction)
        assert not any(f"{color} {shape}" in text for color, shape in HELD_OUT for text in texts)


def test_another_process_draws_the_same_world():
    runs = [subprocess.run([sys.executable, "-c", FINGERPRINT], capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")]
    assert runs[0] == runs[1] and len(runs[0].strip()) == 64
