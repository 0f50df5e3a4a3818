"""What pages cannot see of training: a run that was interrupted, two processes, and the same command twice give the same weights."""
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from arm.core import load_tensors, save_tensors, seeded
from arm.data.openmoji import DATA, load_openmoji
from arm.data.text import default_tokenizer
from arm.model.tasks import Arm
from arm.model.transformer import ARM, ARMConfig
from arm.tokenizer.decoder import DecoderConfig
from arm.tokenizer.model import TokenizerConfig, VisualTokenizer
from arm.tokenizer.siglip import CaptionReader, ReaderConfig, SiglipTowers, TowersConfig
from arm.train import renderers, run, sft
from arm.train.arm import LitARM
from arm.train.data import ShapesPictures, StepData, mixed_pictures, subset
from arm.train.pool import ShapesPool, mixed_tokens
from arm.train.processes import run_processes
from arm.train.meanwhile import read_log
from arm.train.run import RunConfig, fit, train_teacher
from arm.train.tokenizer import LitTeacher, LitTokenizer
from tools.repo import ROOT

os.environ["TQDM_DISABLE"] = "1"
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
TEXT = default_tokenizer()
SIZES = replace(TokenizerConfig.tiny(), down_dim=64, up_dim=64, up_layer=1, feature_dim=32, reader_dim=32, decoder=DecoderConfig(dim=64, n_layer=1, n_head=2, patch_size=8))
KINDS = ("tokenizer", "decoder", "arm")


def judges():
    return (SiglipTowers(replace(TowersConfig.tiny(), dim=32, n_layer=1, n_head=2, ffn_dim=64, text_layer=1, text_head=2)),
            CaptionReader(replace(ReaderConfig.tiny(), dim=32, n_layer=1, n_head=2, n_kv_head=1, ffn_dim=64)))


def stage(kind: str, n_steps: int):
    "A small module of a stage, and its batches."
    with seeded(0, kind):
        if kind == "arm":
            cfg = replace(ARMConfig.tiny(), dim=32, n_layer=1, n_head=2, n_kv_head=1, ffn_dim=64, text_size=TEXT.vocab_size)
            tokenizer, model = VisualTokenizer(SIZES).eval(), ARM(cfg)
            return LitARM(model, n_steps), mixed_tokens([ShapesPool(tokenizer, TEXT, 12, seed=0, n_captions=1, progress=False)], model.vocab, 8, seed=0)
        towers, reader = judges()
        if kind == "teacher": return LitTeacher(towers, reader, TEXT, n_steps), mixed_pictures([ShapesPictures()], 8, seed=0)
        joint = kind == "tokenizer"
        module = LitTokenizer(VisualTokenizer(SIZES), towers, reader, TEXT, n_steps, stage="joint" if joint else "decoder", flip_rate=0. if joint else .05, recolour=.5, semantic_every=2)
        return module, mixed_pictures([ShapesPictures()], 8, seed=0)


def same(a: dict, b: dict): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class PowerCut(Exception): pass


def cut_at(draw, last: int):
    "The batches of `draw`, until the power is cut."
    def cut(step, rank, world):
        if step >= last: raise PowerCut
        return draw(step, rank, world)
    return cut


@pytest.mark.parametrize("kind", (*KINDS, "teacher"))
def test_an_interrupted_run_gives_the_same_bits(kind, tmp_path):
    module, draw = stage(kind, 6)
    straight = fit(module, draw, 6, tmp_path/"straight", kind, every=2).state_dict()
    start = stage(kind, 6)[0].state_dict()
    assert not same(start, straight)
    for last in (1, 3, 5):  # before any checkpoint; one step after the first; one after the second
        with pytest.raises(PowerCut): fit(stage(kind, 6)[0], cut_at(draw, last), 6, tmp_path/"broken", kind, every=2)
    assert torch.load(tmp_path/"broken"/"last.ckpt", weights_only=True)["global_step"] == 4
    assert same(fit(stage(kind, 6)[0], draw, 6, tmp_path/"broken", kind, every=2).state_dict(), straight)
    assert read_log(tmp_path/"broken") == read_log(tmp_path/"straight")


def test_workers_that_prepare_batches_do_not_skip_any_after_a_resume(tmp_path):
    module, draw = stage("decoder", 4)
    straight = fit(module, draw, 4, tmp_path/"straight", "decoder", every=2).state_dict()
    with pytest.raises((PowerCut, ValueError)): fit(stage("decoder", 4)[0], cut_at(draw, 3), 4, tmp_path/"broken", "decoder", every=2, num_workers=1)
    assert same(fit(stage("decoder", 4)[0], draw, 4, tmp_path/"broken", "decoder", every=2, num_workers=1).state_dict(), straight)


def test_a_run_that_ends_early_is_no_finished_run(tmp_path):
    module, draw = stage("decoder", 4)
    step = module.training_step
    def asked_to_stop(batch, batch_idx):
        module.trainer.should_stop = module.global_step == 1 # a callback, a time limit, a signal
        return step(batch, batch_idx)
    module.training_step = asked_to_stop
    with pytest.raises(ValueError, match="stopped after 2 of 4 steps"): fit(module, draw, 4, tmp_path, "decoder", every=1)
    assert fit(stage("decoder", 4)[0], draw, 4, tmp_path, "decoder", every=1).global_step == 4 # and goes on


@pytest.mark.parametrize("device, devices, accelerator, cards, precision", [("auto", 1, "cuda", 1, "32-true"), ("auto", 2, "cuda", 2, "32-true"), ("cuda", 2, "cuda", 2, "32-true"), ("cuda:1", 1, "cuda", [1], "32-true"), ("cpu", 1, "cpu", 1, "bf16-mixed")])
def test_a_machine_with_cards_trains_where_it_is_told(device, devices, accelerator, cards, precision, tmp_path, monkeypatch):
    class Begun(Exception): pass
    def begun(**asked): raise Begun((asked["accelerator"], asked["devices"], asked["precision"]))
    for name, answer in (("is_available", True), ("device_count", 2), ("is_bf16_supported", False)): monkeypatch.setattr(torch.cuda, name, lambda answer=answer, **_: answer)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(run.L, "Trainer", begun)
    module, draw = stage("decoder", 4)
    with pytest.raises(Begun) as seen: fit(module, draw, 4, tmp_path/"run", "decoder", device=device, devices=devices)
    assert seen.value.args[0] == (accelerator, cards, precision)
    with pytest.raises(ValueError, match="one card trains in one process"): fit(module, draw, 4, tmp_path/"other", "decoder", device="cuda:1", devices=2)
    with pytest.raises(ValueError, match="cuda:2"): fit(module, draw, 4, tmp_path/"other", "decoder", device="cuda:2")
    assert not (tmp_path/"other").exists()


def test_every_stage_hands_its_device_on(tmp_path, monkeypatch):
    class Begun(Exception): pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    def begun(*_, **asked): raise Begun(asked["device"])
    def told(stage, **more):
        with pytest.raises(Begun) as seen: stage(str(tmp_path/stage.__name__), device="cuda:1", **more)
        return seen.value.args[0]
    small = dict(steps=2, batch=4, every=2)
    for home in (run, sft, renderers): monkeypatch.setattr(home, "fit", begun)
    assert told(train_teacher, quick=True, **small) == told(run.train_all, quick=True, **small) == "cuda:1"
    assert told(sft.train_sft, worlds=("shapes",), scenes=16, **small) == told(renderers.train_renderers, quick=True, model=str(DATA/"models"/"tiny"), **small) == "cuda:1"
    monkeypatch.undo()
    whole = str(tmp_path/"whole")
    train_teacher(whole, quick=True, device="cpu", **small)
    for next_one, more in ((run.train_tokenizer, {}), (run.train_arm, dict(scenes=16))):
        with monkeypatch.context() as patch:
            patch.setattr(run, "fit", begun)
            with pytest.raises(Begun, match="cpu"): next_one(whole, quick=True, device="cpu", **more, **small)
        if next_one is run.train_tokenizer: next_one(whole, quick=True, **small)


def test_the_same_command_twice_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"): train_teacher(str(tmp_path/name), quick=True, steps=2, batch=4, every=2)
    for part in ("towers", "reader"):
        assert (tmp_path/"one"/"teacher"/f"{part}.safetensors").read_bytes() == (tmp_path/"two"/"teacher"/f"{part}.safetensors").read_bytes()


def plain_steps(module):
    "Plain gradient descent: weights then differ by as much as gradients do, and a gradient of the wrong size shows."
    module.configure_optimizers = lambda: torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=.05)
    return module


def descend(out, devices: int):
    "Three steps of each stage; the first process writes the weights."
    for kind in KINDS:
        module, draw = stage(kind, 3)
        fit(plain_steps(module), draw, 3, out/kind, kind, precision="32-true", devices=devices, strategy="auto" if devices == 1 else "ddp_find_unused_parameters_true")
        if os.environ.get("RANK", "0") == "0": save_tensors(out/f"{kind}.safetensors", module.state_dict())


def test_two_processes_equal_one(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT/"tests")])}
    other = subprocess.Popen([sys.executable, __file__, str(tmp_path/"two")], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    descend(tmp_path/"one", 1)
    said, _ = other.communicate()
    assert other.returncode == 0, said[-3000:]
    for kind in KINDS:
        start = stage(kind, 3)[0].state_dict()
        one, two = (load_tensors(tmp_path/n/f"{kind}.safetensors") for n in ("one", "two"))
        apart = {k: float((one[k].float() - two[k].float()).abs().max()) for k in one}
        worst = max(apart, key=apart.get)
        assert apart[worst] < 1e-5, f"{kind}: {worst} differs by {apart[worst]}"
        assert max(float((one[k].float() - start[k].float()).abs().max()) for k in one) > 1e-3, "the weights hardly moved: nothing was compared"


def test_each_process_trains_on_its_own_share():
    draw = stage("tokenizer", 1)[1]
    whole, data = draw(0, 0, 1), StepData(draw, 1)
    data.trainer = SimpleNamespace(global_rank=1, world_size=2, global_step=0)
    mine = next(iter(data.train_dataloader()))
    assert torch.equal(mine.images, whole.images[1::2]) and list(mine.texts) == whole.texts[1::2]


def test_the_long_run_trains_both_worlds_as_its_preset_says(tmp_path, monkeypatch):
    few = subset(load_openmoji(), ("1F3CA", "1F6B4", "1F938", "1F939", "1F93E"))
    drawn = []
    def watched(worlds, *args):
        for pool in worlds:
            if not hasattr(pool, "watched"): pool.watched, pool.sample = True, lambda *a, pool=pool, sample=pool.sample: (drawn.append(type(pool).__name__), sample(*a))[1]
        return mixed_tokens(worlds, *args)
    monkeypatch.setattr(run, "load_openmoji", lambda: few)
    monkeypatch.setattr(run, "mixed_tokens", watched)
    run.train_all(tmp_path/"run", steps=1, batch=6, scenes=16)
    said = RunConfig.shipped()
    pools = drawn[:6]
    assert pools.count("EmojiPool") == said.emoji * pools.count("ShapesPool") > 0
    arm = Arm.from_pretrained(tmp_path/"run"/"model")
    assert (tuple(arm.tokenizer.cfg.stages), arm.model.cfg.ffn_dim, arm.model.cfg.n_bits) == (said.stages, said.ffn_dim, sum(said.stages))
    assert {k: arm.card["run"][k] for k in ("worn", "mirror", "disguised", "shades", "emoji")} == {k: getattr(said, k) for k in ("worn", "mirror", "disguised", "shades", "emoji")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_processes(descend, 2, sys.argv[1], Path(sys.argv[1]), 2, method="fork")
