"""What pages cannot see of studies: a broken-off training, a finished study, and rows that depend on their seed alone."""
import logging
import os
from dataclasses import replace

import pytest
import torch
from arm.app.study import find, place, run_study, study
from arm.core import load_json, load_tensors, save_json
from arm.eval.tokenizer import make_cases, score_tokenizer
from arm.tokenizer.decoder import DecoderConfig
from arm.tokenizer.losses import LossWeights
from arm.train import study as lab
from arm.train.study import STUDIES, Study, Variant, build, published, read_table, row_folder, train_variant

os.environ["TQDM_DISABLE"] = "1"
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
SMALL = replace(published(), down_dim=32, down_layer=1, up_dim=32, up_layer=1, decoder=DecoderConfig(dim=32, n_layer=1, n_head=2, patch_size=8))
TOY = Variant(tokenizer=SMALL, steps=4, batch=4, score_every=2, teacher_steps=1, teacher_batch=4)


class PowerCut(Exception): pass


def weight(module) -> dict[str, float]:
    "A score that any difference of the weights shows."
    return {"weight": float(sum(p.double().abs().sum() for p in module.tokenizer.parameters()))}


@pytest.fixture(scope="module")
def home(tmp_path_factory): return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def row(home): return train_variant(TOY, 0, home, weight)


def test_a_row_is_a_function_of_its_seed(home, row, tmp_path):
    torch.randn(3)  # nothing that was drawn globally before may matter
    assert train_variant(TOY, 0, tmp_path, weight) == row
    assert train_variant(TOY, 1, home, weight)["weight"] != row["weight"]
    assert train_variant(replace(TOY, lr=1e-3), 0, home, weight)["weight"] != row["weight"]


def test_being_measured_does_not_disturb_a_training(home, row):
    rarely = train_variant(replace(TOY, score_every=4), 0, home, weight)
    assert rarely == row and len(load_json(row_folder(TOY, 0, home)/"row.json")["points"]) == 3
    often, seldom = (load_tensors(row_folder(v, 0, home)/"tokenizer.safetensors") for v in (TOY, replace(TOY, score_every=4)))
    assert all(torch.equal(often[k], seldom[k]) for k in often)


@pytest.mark.parametrize("step", (0, 2, 4))
def test_a_broken_off_training_goes_on_and_gives_the_same_row(step, home, row, tmp_path):
    def cut(module):
        if module.global_step == step: raise PowerCut
        return weight(module)
    (tmp_path/"judges-1x4").symlink_to(home/"judges-1x4")
    with pytest.raises(PowerCut): train_variant(TOY, 0, tmp_path, cut)
    folder = row_folder(TOY, 0, tmp_path)
    assert not (folder/"row.json").exists()
    assert train_variant(TOY, 0, tmp_path, weight) == row
    whole = load_json(row_folder(TOY, 0, home)/"row.json")["points"]
    assert load_json(folder/"row.json")["points"] == whole and [p["step"] for p in whole] == [0, 2, 4]


def test_a_finished_row_is_read_and_keeps_no_checkpoint(home, row):
    def never(module): raise AssertionError("measured again")
    assert train_variant(TOY, 0, home, never) == row
    assert not list(row_folder(TOY, 0, home).glob("*.ckpt"))


def test_single_objectives_and_balanced_weights_train(home):
    alone = train_variant(replace(TOY, steps=2, tokenizer=replace(SMALL, weights=LossWeights(cap=1, pix=0, sig=0, feat=0))), 0, home, weight)
    assert "norm/cap" in alone and not [k for k in alone if k.startswith("cos/") or k == "norm/pix"]
    assert train_variant(replace(TOY, balance=True), 0, home, weight)["weight"] != train_variant(TOY, 0, home, weight)["weight"]


def test_scores_are_the_same_twice_and_all_finite(home, row):
    module = lab.Measured(TOY, lab.load_teacher(home/"judges-1x4"), 0, weight, home/"none.json").eval()
    cases = make_cases(8)
    first, second = (score_tokenizer(module.tokenizer, module.towers, module.text, cases, pool=module.pool) for _ in range(2))
    assert first == second and all(v == v and abs(v) < 1e9 for v in first.values())


def toys(trained: list, cut_at: int = 99) -> dict[str, Study]:
    "A study whose rows take no time; the power is cut before row `cut_at`."
    def train(config, seed, folder, score):
        note = row_folder(config, seed, folder)/"row.json"
        if note.exists(): return load_json(note)["row"]
        if len(trained) == cut_at: raise PowerCut
        trained.append((config.lr, seed))
        save_json(note, dict(row={"score": config.lr + seed}))
        return {"score": config.lr + seed}
    return {"toy": Study(question="Does it?", variants={"base": Variant(), "fast": Variant(lr=1.)}, row=train)}


def run(tmp_path, studies, **options):
    return run_study("toy", tmp_path/"runs", studies=studies, score=weight, record=tmp_path/"recorded", **options)


def test_an_interrupted_study_trains_each_row_once(tmp_path):
    trained = []
    with pytest.raises(PowerCut): run(tmp_path, toys(trained, 4))
    assert len(trained) == 4 and [p.name for p in (tmp_path/"recorded").iterdir()] == ["unfinished"]  # the notes of finished rows, to be committed
    rows = read_table(run(tmp_path, toys(trained)))
    assert sorted(trained) == sorted((lr, s) for lr in (1.5e-3, 1.) for s in range(3)) and len(rows) == 6
    note = load_json(tmp_path/"recorded"/"toy.json")
    assert note["command"] == "arm study toy" and note["seeds"] == [0, 1, 2] and note["variants"]["fast"]["lr"] == 1.


def test_a_finished_study_is_never_touched(tmp_path, capsys):
    final = run(tmp_path, toys([]))
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path/"recorded").iterdir()}
    capsys.readouterr()
    for seeds in (3, 5):
        trained = []
        assert run(tmp_path, toys(trained), seeds=seeds) == final and not trained
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and "finished" in said and str(final) in said
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path/"recorded").iterdir()} == before


def test_a_trial_never_passes_for_the_study(tmp_path):
    for options in (dict(seeds=1), dict(seeds=2, steps=5), dict(steps=5)):
        assert run(tmp_path, toys([]), **options).parent == tmp_path/"runs"/"toy"
    assert not (tmp_path/"recorded").exists()
    assert place("toy", "runs", 3, 0, "recorded").as_posix() == "recorded/toy.csv"


def test_unknown_names_and_impossible_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="objectives, long, weights, bits, quantizers, designs"): study("speed", out=str(tmp_path))
    with pytest.raises(ValueError, match="choose one of toy"): find("", toys([]))
    for bad in (dict(seeds=0), dict(steps=-1)):
        with pytest.raises(ValueError, match="at least one seed"): run(tmp_path, toys([]), **bad)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", STUDIES)
def test_every_variant_of_every_study_can_be_built(name):
    for variant in STUDIES[name].variants.values():
        if variant.quantizer: pytest.importorskip("arm.tokenizer.quantizers")
        with torch.device("cpu"): assert build(replace(variant, tokenizer=replace(variant.tokenizer, down_dim=32, up_dim=32, decoder=SMALL.decoder)), 0).fsq.codebook_size > 1
