"""The evaluation itself on the stand: who knows all gets full marks, who copies gets none, and every promised number is there."""
import pytest
import torch

from arm.core import load_json, make_generator, seeded
from arm.data.openmoji import load_openmoji
from arm.data.text import default_tokenizer
from arm.eval.nearest import gallery, nearest
from arm.eval.openmoji import emoji_items
from arm.eval.shapes import shapes_items
from arm.eval.scores import Lookup, by, majority, wilson
from arm.eval.suite import GOALS, evaluate, kept, oracle, save_scores, score_table
from arm.model.tasks import Arm
from arm.model.transformer import ARM, ARMConfig
from arm.tokenizer.model import TokenizerConfig, VisualTokenizer

N = 24
OTHER = ("majority", "locality", "psnr", "copy", "/tone/")  # these are no shares of right answers, or have a ceiling of their own
ISSUE = [f"{w}/{t}" for w in ("shapes", "openmoji") for t in ("t2i/strict/t1", "t2i/strict/greedy", "edit/strict/t1", "edit/strict/greedy", "qa/exact",
                                                            "caption/exact", "reconstruct/scene", "t2i_unseen/strict/greedy")]


@pytest.fixture(scope="module")
def perfect(): return evaluate(oracle(n=N), n=N, progress=False)


@pytest.fixture(scope="module")
def untrained():
    with seeded(0, "test eval"): return Arm(VisualTokenizer(TokenizerConfig.tiny()), ARM(ARMConfig.tiny()), default_tokenizer())


def test_who_knows_all_gets_full_marks(perfect):
    assert {k: s["value"] for k, s in perfect.items() if not any(w in k for w in OTHER) and s["value"] != 1} == {}
    assert all(s["value"] >= .9 for k, s in perfect.items() if "/tone/" in k and "locality" not in k)


def test_lossless_local_codes_change_nowhere(perfect):
    assert {s["value"] for k, s in perfect.items() if "codes_changed" in k or "bits_changed" in k} == {0.}
    assert all(0 < s["value"] < 1 for k, s in perfect.items() if "patches_changed" in k)


def test_who_copies_the_source_edits_nothing(perfect):
    copied = evaluate(oracle(n=N, copy=True), n=N, progress=False)
    edits = [k for k in copied if "/edit" in k and "/strict/" in k]
    assert len(edits) > 30 and {copied[k]["value"] for k in edits} == {0.}
    assert {copied[f"{w}/edit/copy"]["value"] for w in ("shapes", "openmoji")} == {0.}
    assert copied["shapes/edit/kept/greedy"]["value"] == 1 and copied["shapes/edit/instruction/greedy"]["value"] == 0
    assert all(copied[k] == perfect[k] for k in copied if "/edit" not in k)


def test_every_promised_key_is_there(perfect):
    assert not set(ISSUE) - set(perfect) and not set(GOALS) - set(perfect)
    finer = {"shapes/t2i/strict/greedy/counting", "shapes/t2i/strict/greedy/canvas_2x3", "shapes/edit/strict/greedy/recolour", "shapes/qa/exact/colour",
             "shapes/qa/majority/colour", "shapes/edit/copy", "shapes/reconstruct/psnr", "shapes/locality/codes_changed", "openmoji/t2i_unseen/strict/t1",
             "openmoji/t2i_unseen/top5/greedy", "openmoji/t2i_concept/strict/greedy", "openmoji/edit/strict/greedy/combo/tone_tone",
             "openmoji/edit/strict/greedy/pair/clock", "openmoji/edit/copy", "openmoji/qa/majority/combo/tone", "openmoji/caption/exact/train",
             "openmoji/reconstruct/strict/concept", "openmoji/reconstruct/psnr/combo", "openmoji/locality/codes_changed/gender", "openmoji/t2i_unseen/tone/greedy",
             "openmoji/t2i_unseen/concept/greedy"}
    assert not finer - set(perfect)


def test_intervals_hold_their_values(perfect):
    for key, s in perfect.items():
        assert set(s) == {"value", "low", "high", "n"} and s["n"] >= 1, key
        assert s["low"] <= s["value"] <= s["high"], key


def test_equal_seeds_give_equal_items_and_other_seeds_others():
    assert shapes_items(30, 1) == shapes_items(30, 1) != shapes_items(30, 2)
    om = load_openmoji()
    a, b, c = emoji_items(om, 30, 1), emoji_items(om, 30, 1), emoji_items(om, 30, 2)
    assert (a.words, a.rows, a.edits, a.asked) == (b.words, b.rows, b.edits, b.asked) and a.rows["train"] != c.rows["train"]


def test_held_out_targets_are_held_out():
    om, items = load_openmoji(), emoji_items(load_openmoji())
    assert {om.split[i] for r in items.targets["combo"] for i in r} == {"combo"}
    assert {om.split[i] for r in items.targets["pair"] for i in r} == {"train"}
    assert all(om.split[i] == side for side, ids in items.rows.items() for i in ids)


def test_an_untrained_model_runs_through_and_knows_nothing(untrained):
    scores = evaluate(untrained, n=2, worlds=("shapes",), progress=False)
    assert scores == evaluate(untrained, n=2, worlds=("shapes",), progress=False)
    assert scores["shapes/t2i/strict/greedy"]["value"] == scores["shapes/caption/exact"]["value"] == 0


def test_scores_are_saved_as_they_are_and_shown_beside_their_goals(perfect, tmp_path):
    assert load_json(save_scores(tmp_path/"scores.json", perfect)) == perfect
    table = score_table(perfect)
    assert table.count("\n") == len(GOALS) + 7 + 1 and "kept" in table and "missed" not in table
    assert "missed" in score_table({"shapes/qa/exact": by("k", [False])["k"]})
    assert "missed" in score_table({"shapes/locality/codes_changed": by("k", [True])["k"]}) and kept("shapes/qa/exact", .97, .97)


def test_progress_names_every_task():
    told = []
    evaluate(oracle(n=3, worlds=("shapes",)), n=3, worlds=("shapes",), progress=told.append)
    assert len(told) == 13 and all(t.startswith("shapes/") for t in told)


@pytest.mark.parametrize("n", [1, 2, 10, 100, 10_000])
def test_wilson_stays_inside_and_shrinks(n):
    for k in {0, 1, n // 2, n - 1, n}:
        low, high = wilson(k, n)
        assert 0 <= low <= k / n <= high <= 1
        assert high - low > wilson(10 * k, 10 * n)[1] - wilson(10 * k, 10 * n)[0]


def test_majority_is_the_best_constant():
    assert majority("m", ["a", "b", "b"], ["x"] * 3)["m/x"]["value"] == pytest.approx(2 / 3, abs=1e-4)


def test_every_distinct_picture_is_nearest_to_itself_and_noise_does_not_matter_much():
    om = load_openmoji()
    g = gallery(om)
    ids = g.ids[::9]
    assert torch.equal(nearest(om.images[ids], g, 1)[0][:, 0], ids)
    noise = torch.randn((len(ids), 3, 48, 48), generator=make_generator(0, "noise")) * 25 / 127.5
    assert (nearest((om.images[ids] / 127.5 - 1 + noise).clamp(-1, 1), g, 1)[0][:, 0] == ids).float().mean() > .96


def test_lookup_keeps_pictures_of_all_sizes():
    for side in ((32, 48), (48, 32)):
        image = torch.randint(0, 256, (3, *side), generator=make_generator(0, "side"), dtype=torch.uint8)
        model = Lookup()
        assert torch.equal(((model.decode(model.encode([image]))[0] + 1) * 127.5).round().byte(), image)
