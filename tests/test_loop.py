"""Reinforcement learning as users meet it: two real processes make the update of one, a command trains, and the weights that ship are what their card says."""
import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from arm.app.cli import main
from arm.core import load_json, load_tensors, make_rng, save_tensors, seeded
from arm.model.sequence import Batch, ImagePrompt, image_sample, pad_batch
from arm.model.tasks import Arm
from arm.model.transformer import ARM, ARMConfig
from arm.rl.grpo import GRPOConfig
from arm.rl.loop import LitGRPO
from arm.rl.prompts import Item, ShapesItems, examined, mixed_items
from arm.rl.recipe import PhaseConfig, grpo_recipe, told
from arm.rl.rewards import Reward
from arm.tokenizer.model import VisualTokenizer
from arm.tokenizer.renderfiles import digest
from arm.train.processes import run_processes
from arm.eval.compare import tasks
from arm.train.meanwhile import read_log
from arm.train.run import fit
from test_train import SIZES, TEXT, PowerCut
from tools.repo import ROOT

STEPS = 3


def bright(images: torch.Tensor) -> list[Reward]:
    "Brightness; pictures that are wider than high have a part of their own."
    return [Reward(light := (float(x.mean()) + 1) / 2, {"light": light} | ({"wide": 1 - light} if x.shape[-1] > x.shape[-2] else {})) for x in images]


class Lamps:
    "Prompts of several lengths, with and without a source picture; brightness is the reward, and some groups teach nothing."
    def __call__(self, rng, task):
        text, grid = [rng.randrange(1, 50) for _ in range(rng.randint(1, 5))], rng.choice([(1, 2), (2, 2)])
        source = torch.tensor([rng.randrange(2 ** len(SIZES.levels)) for _ in range(grid[0] * grid[1])]) if task == "edit" else None
        flat = rng.random() < .5
        judge = (lambda images: [Reward(1., {}) for _ in images]) if flat else bright
        return Item(task, ImagePrompt(text, grid, source), judge, "a lamp", rng.getrandbits(40))


class Frail(LitGRPO):
    "The power is cut before step `cut_at`."
    cut_at = -1
    def on_train_batch_start(self, *_):
        if self.global_step == self.cut_at: raise PowerCut


def module(kind=LitGRPO, **options):
    with seeded(0, "grpo"):
        tokenizer = VisualTokenizer(SIZES).eval()
        model = ARM(replace(ARMConfig.tiny(), dim=32, n_layer=2, n_head=4, n_kv_head=2, ffn_dim=64, text_size=TEXT.vocab_size))
        return kind(model, tokenizer, replace(GRPOConfig.tiny(), num_generations=4, beta=.01), STEPS, 1e-3, **options)


def documents(step: int, rank: int, world: int) -> list[Batch]:
    "Six supervised documents of unlike lengths, shared out."
    vocab, rng = module().model.vocab, make_rng(step, "documents")
    docs = [image_sample(vocab, ImagePrompt([rng.randrange(1, 50)] * (1 + k), (1, 1 + k)), torch.tensor([rng.randrange(16)] * (1 + k))) for k in range(6)]
    return [pad_batch(vocab, docs[rank::world])]


def train(out: Path, n: int, plain: bool = False):
    "What each process runs; plain gradient descent without a clip forgets nothing of a gradient's size."
    lit = module(replay=documents)
    if plain: lit.configure_optimizers, lit.configure_gradient_clipping = (lambda: torch.optim.SGD(lit.model.parameters(), lr=.05)), (lambda *_, **__: None)
    fit(lit, mixed_items([Lamps()], 6, 0), STEPS, out, "grpo", every=1, precision="32-true", devices=n, strategy="ddp_find_unused_parameters_true" if n > 1 else "auto")
    if os.environ.get("RANK", "0") == "0": save_tensors(out/"weights.safetensors", lit.model.state_dict())


def two_updates(out: Path, cut_at: int):
    "Two updates on one rollout, or one and then a power cut."
    lit = module(Frail, updates=2)
    lit.cut_at = cut_at
    with contextlib.suppress(PowerCut):
        fit(lit, mixed_items([Lamps()], 6, 0, updates=2), 2, out, "grpo", every=1, precision="32-true", devices=2, strategy="ddp_find_unused_parameters_true")
        if os.environ.get("RANK", "0") == "0": save_tensors(out/"weights.safetensors", lit.model.state_dict())


def both(out: Path):
    torch.set_num_threads(1)
    train(out/"one", 1)
    run_processes(train, 2, out/"two", out/"two", 2, method="fork")
    train(out/"plain one", 1, True)
    run_processes(train, 2, out/"plain two", out/"plain two", 2, True, method="fork")
    for name, cut_at in (("straight", -1), ("broken", 1), ("broken", -1)): run_processes(two_updates, 2, out/f"{name}{cut_at}", out/name, cut_at, method="fork")


def test_two_processes_make_the_update_of_one(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT/"tests")])}
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    start = {k: v.clone() for k, v in module().model.state_dict().items()}
    for kind in ("", "plain "):
        one, two = (load_tensors(tmp_path/f"{kind}{n}"/"weights.safetensors") for n in ("one", "two"))
        moved = sum(float((one[k] - start[k]).pow(2).sum()) for k in one) ** .5
        apart = sum(float((one[k] - two[k]).pow(2).sum()) for k in one) ** .5
        assert moved > 1e-2, "nothing was learnt, so nothing was compared"
        assert apart < 1e-3 * moved, (kind, apart, moved)
    log, shared = (read_log(tmp_path/n) for n in ("one", "two"))
    assert 0 < min(log["live_samples"][1]) < 1  # groups without variance were among them
    assert log.keys() == shared.keys() >= {"reward", "entropy", "surprise", "kl", "ratio_max", "replay", "no_verdict", "t2i_total", "edit_light", "edit_wide"}
    for name, (steps, values) in log.items():  # the log of two processes is that of one, not that of the first process
        assert shared[name][0] == steps and len(steps) == STEPS, name
        assert shared[name][1] == pytest.approx(values, rel=1e-3, abs=1e-5, nan_ok=True), name
    assert len(set(log["reward"][1])) == len(set(log["replay"][1])) == STEPS
    straight, broken = (load_tensors(tmp_path/name/"weights.safetensors") for name in ("straight", "broken"))
    assert all(torch.equal(v, broken[k]) for k, v in straight.items())  # broken off between two updates on one rollout: each process went on with its own drawings
    assert any(not torch.equal(v, start[k]) for k, v in straight.items()) and len(read_log(tmp_path/"broken")["reward"][0]) == 1


def test_a_judge_that_is_away_ends_no_run():
    lit = module()
    silent = lambda images: [Reward(float("nan"), {}) for _ in images]
    held = lit.draw([Item("t2i", ImagePrompt([1, 2], (1, 2)), silent, "a lamp", 0)])
    assert held.advantages.isnan().all()
    loss, _ = lit.update_loss(held)
    assert float(loss) == 0


def test_the_weights_after_reinforcement_share_the_tokenizer_of_the_start():
    models = ROOT/"data"/"models"
    start, after = (Arm.from_pretrained(models/name) for name in ("tiny", "tiny-rl"))
    assert not (models/"tiny-rl"/"tokenizer.safetensors").exists()
    assert all(torch.equal(v, after.tokenizer.state_dict()[k]) for k, v in start.tokenizer.state_dict().items())
    assert any(not torch.equal(v, after.model.state_dict()[k]) for k, v in start.model.state_dict().items())
    phase = after.card["rl"][-1]
    assert (phase["start"], phase["phase"], phase["worlds"], phase["run"]["seed"]) == ("tiny", "joint", ["shapes", "openmoji"], 0) and after.card["plan"]
    assert phase == told("joint", ("shapes", "openmoji"), PhaseConfig(steps=260, words=True, replay=32), "tiny", phase["weights"])  # what became an option later is not in the way of older runs
    assert all(c in (ROOT/"Makefile").read_text() for c in after.card["command"].split(", then "))  # `make train` is what made it
    assert sum(f.stat().st_size for f in models.rglob("*") if f.is_file()) < 30e6
    one, two = (load_json(models/name/"scores.json") for name in ("tiny", "tiny-rl"))
    assert one.keys() == two.keys() and all(one[k]["n"] == two[k]["n"] for k in one)
    assert two["shapes/t2i/strict/t1"]["low"] > one["shapes/t2i/strict/t1"]["high"]  # what the README claims


@pytest.mark.parametrize("name", ["tiny", "tiny-rl"])
def test_the_shipped_weights_score_as_their_file_says(name):
    folder = ROOT/"data"/"models"/name
    arm, told = Arm.from_pretrained(folder), load_json(folder/"scores.json")
    few = tasks(60, worlds=("shapes",))
    for task in ("shapes/t2i", "shapes/edit", "shapes/t2i_unseen"):
        right = few[task].judge(arm, 0., 0)
        expected = told[f"{task}/strict/greedy"]["value"]
        assert abs(sum(right) - expected*len(right)) <= 2 + 3*(expected*(1 - expected)*len(right))**.5, (task, sum(right), expected)  # three deviations, and rounding


def test_reinforcement_went_on_from_the_shipped_start():
    start, after = (Arm.from_pretrained(ROOT/"data"/"models"/name) for name in ("tiny", "tiny-rl"))
    assert after.card["rl"][-1]["weights"] == digest(start.model) != digest(after.model)


def test_half_precision_with_scaled_losses_is_refused():
    lit, trainer = LitGRPO(ARM(replace(ARMConfig.tiny(), dim=32, n_layer=1, n_head=2, n_kv_head=1, ffn_dim=32)), VisualTokenizer(SIZES), GRPOConfig(), 1), type("Trainer", (), {"precision": "16-mixed"})()
    lit._trainer = trainer
    with pytest.raises(ValueError, match="bf16-mixed"): lit.on_fit_start()
    trainer.precision = "bf16-mixed"
    lit.on_fit_start()


def test_train_grpo_is_a_command(tmp_path, capsys):
    out = str(tmp_path/"rl")
    args = ["train", "grpo", "--out", out, "--phase", "edit", "--steps", "1", "--n_prompts", "1", "--num_generations", "2", "--every", "1", "--replay", "0"]
    assert main(args) == 0 and Arm.from_pretrained(Path(out)/"model").card["rl"][-1]["phase"] == "edit"
    assert main([*args, "--every", "5"]) == 0  # done already
    capsys.readouterr()
    assert main(["train", "grpo", "--out", out, "--phase", "t2i", "--steps", "1"]) == 2
    assert "another run" in capsys.readouterr().err


def test_the_recipe_is_a_command(tmp_path, monkeypatch, capsys):
    for name, value in dict(n_prompts=1, num_generations=2, replay=0).items(): monkeypatch.setitem(grpo_recipe.__kwdefaults__, name, value)  # as small as can be
    args, models = ["recipe", "--steps", "1", "--seed", "3", "--out", str(tmp_path)], [tmp_path/phase/"model" for phase in ("t2i", "edit", "joint")]
    assert main(args) == 0 and f"done: {models[-1]}" in capsys.readouterr().out
    cards = [Arm.from_pretrained(m).card for m in models]
    assert [e["phase"] for e in cards[-1]["rl"]] == ["t2i", "edit", "joint"] and {e["run"]["seed"] for e in cards[-1]["rl"]} == {3}
    assert [c["name"] for c in cards] == ["arm-tiny-t2i", "arm-tiny-t2i-edit", "arm-tiny-t2i-edit-joint"]  # a demo tells them apart
    assert cards[1]["command"].startswith(cards[0]["command"] + ", then arm train grpo ") and f"--phase edit --model {models[0]} --steps 1" in cards[1]["command"]
    times = [(m/"config.json").stat().st_mtime_ns for m in models]
    assert main(args) == 0 and times == [(m/"config.json").stat().st_mtime_ns for m in models]  # done already
    assert main([*args[:2], "2", *args[3:]]) == 2 and "another run" in capsys.readouterr().err


if __name__ == "__main__": both(Path(sys.argv[1]))


class Nobody(Lamps):
    "Prompts whose judge never has a verdict."
    def __call__(self, rng, task): return replace(super().__call__(rng, task), judge=lambda images: [Reward(float("nan"), {}) for _ in images])


def test_a_run_whose_judge_is_silent_stops_and_says_so(tmp_path):
    lit = module()
    lit.patience = 2
    with pytest.raises(ValueError, match="2 rollouts in a row without a single verdict"): fit(lit, mixed_items([Nobody()], 2, 0), STEPS, tmp_path, "grpo", every=1, precision="32-true")
    assert (tmp_path/"last.ckpt").exists() # of the step before
    seen = module()
    seen.patience = 2
    fit(seen, mixed_items([Lamps()], 2, 0), STEPS, tmp_path/"seen", "grpo", every=1, precision="32-true")
    assert seen.silent == 0


def test_no_prompt_is_a_caption_of_the_examination():
    asked, source = examined(), ShapesItems(VisualTokenizer(SIZES).eval(), TEXT)
    assert len(asked) > 500
    words = {source(make_rng(0, "disjoint", i), "t2i").words for i in range(400)} # a fraction of a run
    assert len(words) > 200 and not words & asked
    assert {len(w.split()) for w in words} >= set(range(4, 12)) # short ones are still among them


def test_items_are_the_same_for_any_number_of_processes_and_only_ones_own_are_made():
    made = []
    class Counted(Lamps):
        def __call__(self, rng, task): made.append(task); return super().__call__(rng, task)
    draw = mixed_items([Counted()], 6, 0)
    whole = [i.seed for i in draw(1, 0, 1)]
    made.clear()
    assert [i.seed for i in draw(1, 1, 3)] == whole[1::3] and len(made) == 2
    with pytest.raises(ValueError, match="n_prompts=6 for 7 processes"): draw(0, 0, 7)
