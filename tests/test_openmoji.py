"""Held-out combinations and concepts of OpenMoji do not reach the training data by any road: picture, caption, pair, question or derived picture."""
from collections import defaultdict
from random import Random

import pytest

from arm.data.emojiart import INVENTED, TONES
from arm.data.emojitasks import CLOSED_KINDS, EDIT_KINDS, WORDING, DerivedPairs, instruction, pairs, questions
from arm.data.openmoji import load_openmoji

@pytest.fixture(scope="module")
def om(): return load_openmoji()

def pixels(om, i): return om.images[i].numpy().tobytes()

def test_counts(om):
    assert om.n_true == 4495 and len(om.images) == len(om.rows) == len(om.split)
    assert [len(om.ids(s)) for s in ("train", "combo", "concept")] == [4122, 237, 136]
    assert len(om.ids(distinct=True)) == 4270

def test_identical_pictures_never_cross(om):
    sides = defaultdict(set)
    for i in range(len(om)): sides[pixels(om, i)].add(om.split[i])
    assert all(len(s) == 1 for s in sides.values())

def test_identical_captions_never_cross(om):
    sides = defaultdict(set)
    for i in om.ids(): sides[om.rows[i].annotation.lower()].add(om.split[i])
    assert all(len(s) == 1 for s in sides.values())

def test_held_out_captions_never_occur_in_training(om):
    held = {c.lower() for s in ("combo", "concept") for i in om.ids(s) for c in om.captions(i)[:4]}
    trained = {c.lower() for i in om.ids("train", kind=None) for c in om.captions(i)}
    for i in om.ids("train", kind=None): trained |= {t.lower() for q in questions(om, i) for t in (q.question, q.answer)}
    rng = Random(0)
    trained |= {instruction(p, rng).lower() for p in pairs(om, split="train")}
    assert not held & trained

def test_held_out_pictures_never_occur_in_training_pairs(om):
    held = {pixels(om, i) for s in ("combo", "concept") for i in om.ids(s, kind=None)}
    used = {k for split in ("train", "pair") for p in pairs(om, split=split) for k in (p.src, p.dst)}
    derived, rng = DerivedPairs(om), Random(0)
    used |= {k for p in (derived.sample(rng) for _ in range(20000)) for k in (p.src, p.dst)}
    used |= set(om.ids("train", kind=None))
    assert not any(pixels(om, k) in held for k in used)

def test_derived_pictures_are_new(om):
    true = {pixels(om, i) for i in om.ids()}
    derived = [i for i, r in enumerate(om.rows) if r.derived]
    assert not any(pixels(om, i) in true for i in derived)
    assert {om.rows[i].tone_name for i in om.ids(None, "skin")} == set(INVENTED) and not set(INVENTED) & set(TONES)
    assert all(om.split[i] == "train" and om.split[om.rows[i].source] == "train" for i in om.ids(None, "skin"))

def test_no_concept_loses_all_its_tones(om):
    tones = defaultdict(set)
    for i in om.ids():
        if om.rows[i].tone: tones[om.rows[i].concept, om.rows[i].hair].add(om.split[i])
    assert all(s != {"combo"} for s in tones.values())

def test_combinations_are_held_out_for_every_gender_and_direction(om):
    sides = defaultdict(set)
    for i in om.ids():
        if om.rows[i].tone: sides[om.rows[i].unit].add(om.split[i])
    assert all(len(s) == 1 for s in sides.values())

def test_sides_of_pairs(om):
    for p in pairs(om):
        a, b = om.split[p.src], om.split[p.dst]
        expected = "concept" if "concept" in (a, b) else "combo" if b == "combo" else "source" if a == "combo" else None
        assert p.split == expected if expected else p.split in ("train", "pair")
        assert p.split != "pair" or p.kind in CLOSED_KINDS
    held = {frozenset((p.src, p.dst)) for p in pairs(om, split="pair")}
    assert not held & {frozenset((p.src, p.dst)) for p in pairs(om, split="train")}

@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_every_wording_is_filled(om, kind):
    rng = Random(0)
    for p in pairs(om, kind)[:200]:
        said = instruction(p, rng)
        assert "{" not in said and (p.value in said or p.value in ("bald", "line art", "colours")), said
    assert all(isinstance(w, tuple) for w in WORDING.values())
