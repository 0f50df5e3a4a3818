"""Renderers share one interface: any grid, the same picture for the same seed, files that give it back, and training that learns and resumes."""
import os
from dataclasses import replace

import pytest
import torch
from arm.core import make_generator, make_rng, seeded, to_float
from arm.data.shapes import render
from arm.data.shapetasks import sample_edit
from arm.eval.renderers import agreement, decides, follows, render_codes
from arm.tokenizer.decoder import DecoderConfig
from arm.tokenizer.detokenizer import Detokenizer, DetokenizerConfig, FeedForward, LatentDiT, Painter, PainterConfig, PixelRenderer, time_shift
from arm.tokenizer.renderfiles import load_renderer, save_renderer
from arm.tokenizer.model import TokenizerConfig, VisualTokenizer
from arm.tokenizer.vae import VAE, VAEConfig
from arm.train.data import ShapesPictures, mixed_pictures
from arm.train.renderers import LitDetokenizer, LitPainter, LitVAE
from arm.train.meanwhile import read_log
from arm.train.run import fit

os.environ["TQDM_DISABLE"] = "1"
GRIDS = [(4, 4), (4, 6), (6, 4), (3, 5), (1, 9)]
KINDS = ("pixel", "latent", "feedforward")
SIZES = replace(TokenizerConfig.tiny(), down_dim=32, up_dim=32, up_layer=1, feature_dim=16, reader_dim=16, decoder=DecoderConfig(dim=32, n_layer=1, n_head=2, patch_size=8))


def networks():
    "A tokenizer, an autoencoder, a latent walk and a painter, small and with open gates."
    with seeded(0, "networks"):
        tokenizer, vae = VisualTokenizer(SIZES).eval(), VAE(VAEConfig(widths=(8, 16), n_block=1, latent=4))
        dit = LatentDiT(DetokenizerConfig(dim=32, n_layer=1, n_head=2, ada_dim=16, code_dim=32, latent=4, patch=2))
        painter = Painter(PainterConfig(dim=32, n_layer=1, n_head=2, code_dim=32, patch_size=8))
    for block in (*dit.blocks, *tokenizer.decoder.blocks): torch.nn.init.normal_(block.ada.weight, std=.2, generator=make_generator(0, "gates"))
    return tokenizer, vae, dit, painter


def renderer(kind, parts=None):
    tokenizer, vae, dit, painter = parts or networks()
    return {"pixel": lambda: PixelRenderer(tokenizer), "latent": lambda: Detokenizer(tokenizer, vae, dit, steps=3), "feedforward": lambda: FeedForward(tokenizer, painter)}[kind]()


def indices(grid, n=3): return torch.randint(0, 65_536, (n, grid[0] * grid[1]), generator=make_generator(0, *grid))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_grid_gives_its_picture_and_the_same_one_twice(kind, grid):
    r, ids = renderer(kind), indices(grid)
    painted = r.render(ids, grid, seed=5)
    assert painted.shape == (3, 3, 8 * grid[0], 8 * grid[1]) and painted.abs().max() <= 1 and painted.isfinite().all()
    assert torch.equal(painted, r.render(ids, grid, seed=5))
    assert torch.equal(painted, r.render(ids, grid, seed=6)) == (kind == "feedforward")
    assert (r.render(ids[1:2], grid, seed=5) - painted[1:2]).abs().max() < 1e-4, "a picture depends on its batch mates"


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_requests_are_refused(kind):
    r = renderer(kind)
    with pytest.raises(ValueError, match="expected"): r.render(indices((4, 4)), (4, 5))
    with pytest.raises(ValueError): r.render(indices((4, 4)), (4, 4), steps=0)
    with pytest.raises(ValueError, match="65536"): r.render(indices((4, 4)) + 65_536, (4, 4))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_file_gives_the_renderer_back(kind, tmp_path):
    parts = networks()
    r, ids = renderer(kind, parts), indices((4, 6))
    again = load_renderer(save_renderer(r, tmp_path/"r.safetensors", torch.float32), parts[0])
    assert torch.equal(again.render(ids, (4, 6)), r.render(ids, (4, 6))) and (again.steps, again.guidance) == (r.steps, r.guidance)
    with seeded(1, "other"): other = VisualTokenizer(SIZES)
    with pytest.raises(ValueError, match="another tokenizer"): load_renderer(tmp_path/"r.safetensors", other)
    (tmp_path/"r.safetensors").write_bytes((tmp_path/"r.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole"): load_renderer(tmp_path/"r.safetensors", parts[0])


def test_guidance_one_is_the_plain_network_and_two_is_not():
    r, ids = renderer("latent"), indices((4, 4))
    assert torch.equal(r.render(ids, (4, 4)), r.render(ids, (4, 4), guidance=1.))
    assert not torch.equal(r.render(ids, (4, 4)), r.render(ids, (4, 4), guidance=2.))
    assert (r.render(ids, (4, 4)) - r.render(ids, (4, 4), guidance=1 + 1e-6)).abs().max() < 1e-3


def test_the_time_shift_keeps_ends_and_order_and_is_the_published_formula():
    t = torch.linspace(0, 1, 50, dtype=torch.float64)
    for s in (.5, 1., 3.):
        u, sigma = time_shift(t, s), 1 - t
        assert u[0] == 0 and u[-1] == 1 and (u.diff() > 0).all()
        assert torch.allclose(1 - u, s * sigma / (1 + (s - 1) * sigma))
    assert torch.equal(time_shift(t, 1.), t)


def module(kind, n_steps):
    tokenizer, vae, dit, painter = networks()
    if kind == "vae": return LitVAE(vae, n_steps, lr=5e-3)
    if kind == "painter": return LitPainter(tokenizer, painter, n_steps, lr=5e-3)
    return LitDetokenizer(tokenizer, vae, dit, n_steps, lr=5e-3, teacher=networks()[2] if kind == "student" else None, teacher_steps=2)


EIGHT = ShapesPictures()(make_rng(0, "eight"), 8)


@pytest.mark.parametrize(("kind", "name", "share"), [("vae", "pix", .6), ("detokenizer", "flow", .8), ("painter", "pix", .5)])
def test_the_loss_falls_on_eight_pictures(kind, name, share, tmp_path):
    fit(module(kind, 60), lambda *_: EIGHT, 60, tmp_path, kind, every=5, precision="32-true")
    losses = read_log(tmp_path)[name][1]
    assert sum(losses[-3:]) < share * sum(losses[:3])


class PowerCut(Exception): pass


@pytest.mark.parametrize("kind", ["vae", "detokenizer", "student", "painter"])
def test_an_interrupted_run_gives_the_same_bits(kind, tmp_path):
    draw = mixed_pictures([ShapesPictures()], 4, seed=0)

    def cut(step, rank, world):
        if step >= 3: raise PowerCut
        return draw(step, rank, world)

    straight = fit(module(kind, 4), draw, 4, tmp_path/"straight", kind, every=2).state_dict()
    with pytest.raises(PowerCut): fit(module(kind, 4), cut, 4, tmp_path/"broken", kind, every=2)
    broken = fit(module(kind, 4), draw, 4, tmp_path/"broken", kind, every=2).state_dict()
    assert all(torch.equal(straight[k], broken[k]) for k in straight)
    start = module(kind, 4).state_dict()
    moved = {k.split(".")[0] for k in straight if not torch.equal(straight[k], start[k])}
    assert moved == {"vae" if kind == "vae" else "network"}, "something moved that should stand still, or nothing did"


class FakeArm:
    "Draws other random codes for every seed."
    def __init__(self, tokenizer): self.tokenizer = tokenizer
    def encode(self, images): return [(self.tokenizer.encode(x[None].float() / 127.5 - 1)[0], (x.shape[-2] // 8, x.shape[-1] // 8)) for x in images]
    def imagine_codes(self, prompts, grids, *, temperature, seed): return [(torch.randint(0, 65_536, (h * w,), generator=make_generator(seed + i)), (h, w)) for i, (h, w) in enumerate(grids)]


def test_agreement_takes_mixed_grids_and_counts_every_pair():
    parts = networks()
    arm, names = FakeArm(parts[0]), {k: renderer(k, parts) for k in KINDS}
    grids = [(4, 4), (4, 6), (4, 4)]
    scores, views = decides(arm, names, ["a"] * 3, grids, n_samples=3)
    assert {k.split("/")[1] for k in scores if k.startswith("renderers/")} == {"pixel~latent", "pixel~feedforward", "latent~feedforward"}
    assert scores["samples/tokens"]["n"] == 6 and scores["renderers/pixel~latent/tokens"]["n"] == 3
    assert set(views) == {*KINDS, "sample 0", "sample 1", "sample 2"}
    codes = arm.imagine_codes(["a"] * 3, grids, temperature=1., seed=0)
    assert [tuple(x.shape) for x in render_codes(names["latent"], codes)] == [(3, 8 * h, 8 * w) for h, w in grids]
    alone, _ = agreement(arm, {"a": names["pixel"], "b": names["pixel"]}, codes)
    assert alone["renderers/a~b/tokens"]["value"] == 1. and alone["renderers/a~b/psnr"]["value"] == 60.


def test_an_edit_of_the_tokens_is_followed_by_who_paints_them():
    arm = FakeArm(networks()[0])
    pairs = [sample_edit(make_rng(0, "edits", i), canvas=(2, 3)) for i in range(4)]
    painted = {}
    for source, e in pairs:
        for scene, old in ((source, source), (e.target, source)):
            painted[tuple(arm.encode([render(scene)])[0][0].tolist())] = (to_float(render(scene)), to_float(render(old)))
    assert len(painted) == 8, "codes that tell source and target apart"

    class Lookup:
        def __init__(self, which): self.which = which
        def render(self, ids, grid, *, seed=0): return torch.stack([painted[tuple(i.tolist())][self.which] for i in ids])

    scores = follows(arm, {"right": Lookup(0), "asleep": Lookup(1)}, pairs)
    assert [scores[f"follows/right/{k}"]["value"] for k in ("instruction", "kept", "drift")] == [1., 1., 0.]
    assert [scores[f"follows/asleep/{k}"]["value"] for k in ("instruction", "kept", "drift")] == [0., 1., 0.]
    assert scores["follows/right/drift"]["n"] == 4
