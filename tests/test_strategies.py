"""Real processes: every strategy gives the loss curve of one process, checkpoints move between numbers of processes, and a killed process costs nothing but time."""
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from arm.core import load_tensors, save_tensors, seeded
from arm.model.generate import in_dtype
from arm.model.transformer import ARM, ARMConfig
from arm.tokenizer.model import VisualTokenizer
from arm.train.cost import Sharding
from arm.train.data import ShapesPictures, mixed_pictures
from arm.train.pool import ShapesPool, mixed_tokens
from arm.train.processes import run_processes
from arm.train.strategies import SpreadARM, SpreadTokenizer, fit_spread, read_curve, whole_weights
from arm.train.whole import Filled, shapes_of
from test_train import SIZES, TEXT, judges
from tools.repo import ROOT

STEPS = 4
ONE, ONE_PIECE, TWO = Sharding(kind="single", wide=4), Sharding(kind="fsdp2", wide=4), partial(Sharding, gpus=2, wide=4)
RUNS = {  # name: module, how it is spread, further settings
    "arm": ("arm", ONE, {}),
    "arm in 2 pieces": ("arm", ONE, dict(accumulate=2)),
    "arm compiled": ("arm", ONE, dict(backend="aot_eager")),
    "arm ddp in 2 pieces": ("arm", TWO(kind="ddp"), dict(accumulate=2)),
    "arm fsdp2 checkpointing": ("arm", TWO(kind="fsdp2", checkpointing=True), {}),
    "arm tp checkpointing in 2 pieces": ("arm", TWO(kind="tp", tp=2, checkpointing=True), dict(accumulate=2)),
    "arm fsdp2 bf16": ("arm", Sharding(kind="fsdp2", gpus=2), {}),
    "tokenizer": ("tokenizer", ONE, {}),
    "tokenizer ddp": ("tokenizer", TWO(kind="ddp"), {}),
    "tokenizer fsdp2": ("tokenizer", TWO(kind="fsdp2"), {}),
}
RUNS |= {f"plain {n}": (kind, sharding, settings | dict(plain=True)) for n, (kind, sharding, settings) in RUNS.items() if "compiled" not in n and "bf16" not in n}  # by plain gradient descent, which forgets nothing of a gradient's size
MOVES = [  # a run that is killed in step 4, and how it goes on: name, module, before, after
    ("killed, then as before", "arm", TWO(kind="fsdp2"), TWO(kind="fsdp2")),
    ("from 2 to 1", "arm", TWO(kind="fsdp2"), ONE_PIECE),
    ("from shared matrices to 1", "arm", TWO(kind="tp", tp=2), ONE_PIECE),
    ("tokenizer from 2 to 1", "tokenizer", TWO(kind="fsdp2"), ONE_PIECE),
]
EXACT = [n for n in RUNS if n not in ("arm", "tokenizer") and "bf16" not in n and "plain" not in n]
PLAIN = [n for n in RUNS if "plain" in n and n not in ("plain arm", "plain tokenizer")]


def stage(kind: str, parts: int = 4):
    "A small module, and its batches in parts of like length."
    with seeded(0, kind):
        if kind == "arm":
            model = ARM(replace(ARMConfig.tiny(), dim=32, n_layer=2, n_head=4, n_kv_head=2, ffn_dim=64, text_size=TEXT.vocab_size))
            pool = ShapesPool(VisualTokenizer(SIZES).eval(), TEXT, 12, seed=0, n_captions=1, progress=False)
            return SpreadARM(model, STEPS, optimizer="adamw"), mixed_tokens([pool], model.vocab, 16, seed=0, parts=parts)
        return SpreadTokenizer(VisualTokenizer(SIZES), *judges(), TEXT, STEPS, recolour=.5, semantic_every=2), mixed_pictures([ShapesPictures()], 8, seed=0)


def train(kind: str, out: Path, sharding: Sharding, settings: dict, kill_at: int | None = None):
    "What each process runs; the first one writes the weights."
    module, draw = stage(kind, parts=1 if settings.get("backend") else 4)  # each length is compiled anew
    def until(step, rank, world):
        if step == kill_at and os.environ["RANK"] == "1": os.kill(os.getpid(), signal.SIGKILL)
        return draw(step, rank, world)
    if settings.get("plain"):
        module.configure_optimizers = lambda: torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=.05 if kind == "arm" else 1e-4)
        module.configure_gradient_clipping = lambda *_, **__: None
    fit_spread(module, until, STEPS, out, sharding, every=2, **{k: v for k, v in settings.items() if k != "plain"})
    weights = whole_weights(module) if sharding.sharded else module.state_dict()
    if os.environ.get("RANK", "0") == "0": save_tensors(out/"weights.safetensors", weights)


def spread(kind, out, sharding, settings, kill_at=None):
    if sharding.kind == "single": train(kind, out, sharding, settings)
    else: run_processes(train, sharding.gpus, out, kind, out, sharding, settings, kill_at, method="fork")


def everything(out: Path):
    "All runs of this file in one process and its forks, so that the libraries are loaded once."
    torch.set_num_threads(1)
    said = {}
    for name, (kind, sharding, settings) in RUNS.items():
        try: spread(kind, out/name, sharding, settings)
        except Exception as e: said[name] = f"{type(e).__name__}: {e}"
    for name, kind, before, after in MOVES:
        try: spread(kind, out/name, before, {}, kill_at=3)
        except ChildProcessError as e: said[name] = str(e)
        spread(kind, out/name, after, {})
    (out/"said.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT/"tests")])}
    done = subprocess.run([sys.executable, __file__, str(out)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, json.loads((out/"said.json").read_text())


def check(out, name, kind, said):
    assert (out/name/"weights.safetensors").exists(), said.get(name)
    curve, base = read_curve(out/name), read_curve(out/kind)
    assert len(curve) == len(base) == STEPS
    apart = max(abs(a - b) for a, b in zip(curve, base))
    least = 1e-5 if kind == "arm" else 1e-5 * max(1., max(base))  # the tokenizer's weighted sum is beyond 100, where float32 itself steps by 8e-6
    assert apart <= least, f"{name}: the curve differs by {apart}"
    one, other = (load_tensors(out/n/"weights.safetensors") for n in (kind, name))
    assert one.keys() == other.keys() and all(one[k].shape == other[k].shape for k in one)


@pytest.mark.parametrize("name", PLAIN)
def test_a_strategy_gives_gradients_of_the_same_size(name, results):
    out, said = results
    kind = name.split()[1]
    assert (out/name/"weights.safetensors").exists(), said.get(name)
    start = stage(kind)[0].state_dict()
    one, other = (load_tensors(out/n/"weights.safetensors") for n in (f"plain {kind}", name))
    far = lambda a, b: sum(float((a[k].double() - b[k].double()).square().sum()) for k in one)**.5
    assert far(one, start) > .01 and far(one, other) < 1e-3 * far(one, start), (far(one, other), far(one, start))


@pytest.mark.parametrize("name", EXACT)
def test_a_strategy_gives_the_curve_of_one_process(name, results):
    out, said = results
    check(out, name, RUNS[name][0], said)


def test_half_precision_stays_near(results):
    out, said = results
    assert "arm fsdp2 bf16" not in said, said
    assert max(abs(a - b) for a, b in zip(read_curve(out/"arm fsdp2 bf16"), read_curve(out/"arm"))) < .1


@pytest.mark.parametrize("move", MOVES, ids=[m[0] for m in MOVES])
def test_a_killed_run_goes_on_with_the_same_curve(move, results):
    (out, said), (name, kind, *_) = results, move
    assert "process 1 of 2 was killed by SIGKILL" in said[name] and "goes on from step 2" in said[name] and "\n" not in said[name]
    check(out, name, kind, said)


def test_the_runs_trained_something(results):
    out, _ = results
    for kind in ("arm", "tokenizer"):
        start = stage(kind)[0].state_dict()
        assert max(float((w - start[k]).abs().max()) for k, w in load_tensors(out/kind/"weights.safetensors").items()) > 1e-4


class Late(Filled, SpreadARM):
    "Weights that arrive when the module is configured."


def test_blocks_are_wrapped_where_weights_arrive_late():
    cfg = replace(ARMConfig.tiny(), dim=32, n_layer=2, n_head=4, n_kv_head=2, ffn_dim=64, text_size=TEXT.vocab_size)
    lit = Late(shapes_of(cfg), STEPS, optimizer="adamw")
    lit.source, lit.backend, lit.sharding = (lambda: ARM(cfg)), "eager", replace(ONE, checkpointing=True)
    lit.configure_model()
    assert all("forward" in b.__dict__ for b in lit.model.blocks)
    ids = torch.tensor([[1, 2, 3]])
    lit.model(ids).sum().backward()
    half = in_dtype(lit.model, torch.bfloat16)  # a copy, whose blocks are its own
    assert half(ids).dtype == torch.bfloat16 and not any("forward" in b.__dict__ for b in half.blocks)


if __name__ == "__main__": everything(Path(sys.argv[1]))


@pytest.mark.parametrize("before, after", ((2, 1), (1, 2), (4, 2)))
def test_a_run_goes_on_with_its_steps_in_another_number_of_pieces(before, after, tmp_path):
    module, draw = stage("arm")
    fit_spread(module, draw, STEPS, tmp_path/"whole", ONE, every=2)
    class Cut(Exception): pass
    def cut(step, rank, world):
        if step == 3: raise Cut
        return draw(step, rank, world)
    with pytest.raises(Cut): fit_spread(stage("arm")[0], cut, STEPS, tmp_path/"moved", ONE, every=2, accumulate=before)
    last = fit_spread(stage("arm")[0], draw, STEPS, tmp_path/"moved", ONE, every=2, accumulate=after)
    assert last.global_step == STEPS
    straight, moved = read_curve(tmp_path/"whole"), read_curve(tmp_path/"moved")
    assert len(moved) == STEPS and moved == pytest.approx(straight, abs=1e-4)
    assert max(float((a - b).abs().max()) for a, b in zip(module.state_dict().values(), last.state_dict().values())) < 1e-4


def test_wrong_settings_and_half_lines_of_a_curve(tmp_path):
    module, draw = stage("arm")
    for settings, words in ((dict(accumulate=0), "accumulate=0"), (dict(every=0), "every=0")):
        with pytest.raises(ValueError, match=words): fit_spread(module, draw, STEPS, tmp_path, ONE, **settings)
    (tmp_path/"curve.csv").write_text("\n1,0.5\n2,0.25\n3,0.1\n3\n4,")
    assert read_curve(tmp_path) == [.5, .25, .1]
    (tmp_path/"step-00000001.ckpt").mkdir()
    (tmp_path/"last.json").write_text('{"step": 1, "checkpoint": "step-00000001.ckpt"}')
    with pytest.raises(ValueError, match="cut in pieces"): fit_spread(module, draw, STEPS, tmp_path, ONE)
