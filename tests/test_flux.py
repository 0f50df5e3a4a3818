"""The borrowed painters at a tiny random size: trained, saved, loaded, sampled, and compared with the pipelines of the library that they come from."""
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra: pip install 'arm[flux]'")
pytest.importorskip("peft", reason="needs the extra: pip install 'arm[flux]'")
from arm.core import make_generator, seeded  # noqa: E402
from arm.tokenizer.flux import (  # noqa: E402
    FluxRenderer, RendererConfig, SanaRenderer, flow_sigmas, make_renderer, position_ids, pretrained_parts, random_parts, token_features)
from arm.tokenizer.fluxtune import flow_loss, load_renderer, save_renderer  # noqa: E402
from arm.tokenizer.model import TokenizerConfig, VisualTokenizer  # noqa: E402

FAMILIES = ("flux", "sana")


@pytest.fixture(scope="module")
def features():
    with seeded(0, "tokenizer"): return token_features(VisualTokenizer(TokenizerConfig.tiny()).eval())


def tokens(grid, n=2): return torch.randint(0, 65_536, (n, grid[0] * grid[1]), generator=make_generator(0, "tokens"))


def pictures(grid, n=2): return torch.rand(n, 3, grid[0] * 8, grid[1] * 8, generator=make_generator(0, "pictures")) * 2 - 1


def noise(renderer, grid, n=2):
    "The noise that `render` starts from at seed 0."
    return torch.randn(1, renderer.channels, *renderer.latent_size(grid), generator=torch.Generator().manual_seed(0)).expand(n, -1, -1, -1)


def step(renderer, grid=(2, 4)):
    "One optimizer step; the loss."
    optimizer = torch.optim.AdamW([p for p in renderer.parameters() if p.requires_grad], 1e-2)
    loss = flow_loss(renderer, pictures(grid), tokens(grid), grid, make_generator(0, "loss"))
    loss.backward()
    optimizer.step()
    return loss.item()


# ---- train, save, load, sample ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trainable", ("mapping", "lora", "full"))
def test_trains_saves_loads_and_samples(family, trainable, features, tmp_path):
    cfg = replace(RendererConfig.tiny(family), trainable=trainable)
    renderer, other = (make_renderer(cfg, features) for _ in range(2))
    old = {k: v.clone() for k, v in renderer.state_dict().items()}
    assert all(step(renderer) == pytest.approx(1, abs=5) for _ in range(2))
    moved = {k for k, v in renderer.state_dict().items() if (v != old[k]).any()}
    kinds = {"mapping" if k.startswith("mapping.") else "lora" if "lora_" in k else k.split(".")[0] for k in moved}
    assert kinds == {"mapping": {"mapping"}, "lora": {"mapping", "lora"}, "full": {"mapping", "transformer"}}[trainable]
    painted = renderer.render(tokens((2, 4)), (2, 4), steps=2, guidance=2.)
    assert painted.shape == (2, 3, 16, 32) and painted.isfinite().all() and painted.abs().max() <= 1
    assert (other.render(tokens((2, 4)), (2, 4), steps=2, guidance=2.) != painted).any()
    save_renderer(renderer, tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    loaded = load_renderer(other, tmp_path)
    assert torch.equal(loaded.render(tokens((2, 4)), (2, 4), steps=2, guidance=2.), painted)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_repeats_and_the_paint_depends_on_tokens_seed_and_guidance(family, features):
    renderer, grid = make_renderer(RendererConfig.tiny(family), features), (4, 2)
    with torch.no_grad(): losses = {flow_loss(renderer, pictures(grid), tokens(grid), grid, make_generator(s, "loss")).item() for s in (0, 0, 1)}
    assert len(losses) == 2
    base = renderer.render(tokens(grid), grid, steps=3)
    assert torch.equal(base, renderer.render(tokens(grid), grid, steps=3))
    for other in (renderer.render(tokens(grid).flip(1), grid, steps=3), renderer.render(tokens(grid), grid, steps=3, seed=1), renderer.render(tokens(grid), grid, steps=3, guidance=3.)):
        assert (other - base).abs().max() > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family, features):
    renderer = make_renderer(RendererConfig.tiny(family), features)
    exact = renderer.render(tokens((2, 2)), (2, 2), steps=2)
    renderer.transformer.bfloat16()
    renderer.vae.bfloat16()
    rough = renderer.render(tokens((2, 2)), (2, 2), steps=2)
    assert rough.dtype == torch.float32 and (rough - exact).abs().mean() < .1
    flow_loss(renderer, pictures((2, 2)), tokens((2, 2)), (2, 2), make_generator(0, "loss")).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for name, p in renderer.mapping.named_parameters() if name != "null")


# ---- the library's own arithmetic ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("grid", ((2, 6), (6, 4)))
@pytest.mark.parametrize("embedded", (True, False))
def test_flux_paints_as_its_pipeline_does(grid, embedded, features):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    cfg, (transformer, vae) = RendererConfig.tiny("flux"), random_parts("flux")
    if not embedded:
        with seeded(0, "plain"): transformer = FluxTransformer2DModel.from_config({**transformer.config, "guidance_embeds": False})
        cfg = replace(cfg, shift=1.)  # as FLUX.1[schnell]
    with seeded(0, "mapping"): flux = FluxRenderer(cfg, features, transformer, vae)
    u, everyone = features(tokens(grid), grid), torch.ones(2, dtype=torch.bool)
    with torch.no_grad(): told, null = flux.mapping(u, grid), flux.mapping(u, grid, everyone)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=embedded)
    pipe = FluxPipeline(scheduler, vae, None, None, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)
    ids = position_ids(grid, kind=1., step=8 / 4)
    pipe.encode_prompt = lambda prompt_embeds, pooled_prompt_embeds, **_: (prompt_embeds, pooled_prompt_embeds, ids)
    true = {} if embedded else dict(true_cfg_scale=2.5, negative_prompt_embeds=null[0], negative_pooled_prompt_embeds=null[1])
    packed = FluxPipeline._pack_latents(noise(flux, grid).contiguous(), 2, flux.channels, *flux.latent_size(grid))
    theirs = pipe(height=grid[0] * 8, width=grid[1] * 8, num_inference_steps=5, guidance_scale=2.5, latents=packed, prompt_embeds=told[0],
                  pooled_prompt_embeds=told[1], output_type="pt", **true).images * 2 - 1
    ours = flux.render(tokens(grid), grid, steps=5, guidance=2.5)
    assert (ours - theirs).abs().max() < 2e-5
    assert torch.allclose(flow_sigmas(5, flux.shift(flux.latent_size(grid))), scheduler.sigmas, atol=1e-6)


@pytest.mark.parametrize("guidance", (1., 3.))
def test_sana_paints_as_its_pipeline_does(guidance, features):
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
    grid, sana = (4, 8), make_renderer(RendererConfig.tiny("sana"), features)
    u, mask = features(tokens(grid), grid), torch.ones(2, 32)
    with torch.no_grad(): told, null = sana.mapping(u, grid)[0], sana.mapping(u, grid, torch.ones(2, dtype=torch.bool))[0]
    pipe = SanaPipeline(None, None, sana.vae, sana.transformer, FlowMatchEulerDiscreteScheduler(shift=3.))
    pipe.set_progress_bar_config(disable=True)
    pipe.encode_prompt = lambda *_, **__: (told, mask, null, mask)
    theirs = pipe(negative_prompt=None, height=32, width=64, num_inference_steps=4, sigmas=[1., .75, .5, .25], guidance_scale=guidance, latents=noise(sana, grid), prompt_embeds=told,
                  prompt_attention_mask=mask, negative_prompt_embeds=null, negative_prompt_attention_mask=mask, output_type="pt", use_resolution_binning=False).images * 2 - 1
    assert (sana.render(tokens(grid), grid, steps=4, guidance=guidance) - theirs).abs().max() < 2e-5


# ---- files and mistakes -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A tiny painter of each family in the layout of a hub."
    place = tmp_path_factory.mktemp("painters")
    for family in FAMILIES:
        for part, name in zip(random_parts(family, seed=5), ("transformer", "vae")): part.save_pretrained(place/family/name)
        (place/family/"scheduler").mkdir()
    return place


def schedule(folder, family, **values): (folder/family/"scheduler"/"scheduler_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("values, shift", ((dict(use_dynamic_shifting=True, shift=3.), None), (dict(use_dynamic_shifting=False, shift=1.), 1.), (dict(flow_shift=3., shift=1.), 3.)))
def test_the_time_shift_comes_from_the_schedulers_file(values, shift, folder):
    schedule(folder, "flux", **values)
    assert pretrained_parts(str(folder/"flux"), "flux", local_only=True)[2] == shift


def test_real_weights_are_read_in_the_asked_precision(folder, features):
    schedule(folder, "sana", flow_shift=3.)
    sana = make_renderer(RendererConfig.tiny("sana"), features, str(folder/"sana"), local_only=True)
    assert isinstance(sana, SanaRenderer) and sana.transformer.dtype == sana.vae.dtype == torch.bfloat16 and sana.mapping.out.weight.dtype == torch.float32
    assert sana.render(tokens((2, 2)), (2, 2), steps=1).isfinite().all()


def test_an_unknown_time_shift_is_refused(folder):
    schedule(folder, "flux", use_dynamic_shifting=True, max_shift=2.)
    with pytest.raises(ValueError, match="choose a FLUX.1 model"): pretrained_parts(str(folder/"flux"), "flux", local_only=True)


def test_no_painter_no_network_no_pickle(folder, tmp_path):
    for source, family in (("nobody/nothing", "flux"), (str(tmp_path), "flux"), (str(folder/"sana"/"vae"), "sana")):
        with pytest.raises(ValueError, match="painter that can be read") as e: pretrained_parts(source, family, local_only=True)
        assert "\n" not in str(e.value)
    vae = random_parts("sana")[1]
    random_parts("sana")[0].save_pretrained(tmp_path/"transformer")
    vae.save_pretrained(tmp_path/"vae", safe_serialization=False)
    assert list((tmp_path/"vae").glob("*.bin"))
    with pytest.raises(ValueError, match="painter that can be read"): pretrained_parts(str(tmp_path), "sana", local_only=True)


def test_files_that_do_not_fit_are_refused(features, tmp_path):
    cfg = RendererConfig.tiny("sana")
    renderer = make_renderer(cfg, features)
    save_renderer(renderer, tmp_path)
    with pytest.raises(ValueError, match="settings of the folder"): load_renderer(make_renderer(replace(cfg, width=32), features), tmp_path)
    whole = (tmp_path/"mapping.safetensors").read_bytes()
    (tmp_path/"mapping.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"): load_renderer(renderer, tmp_path)
    with pytest.raises(ValueError, match="does not exist"): load_renderer(renderer, tmp_path/"nowhere")


@pytest.mark.parametrize("missing", ("diffusers", "peft"))
def test_without_the_extra_one_line_says_what_to_install(missing):
    code = f"import sys; sys.modules[{missing!r}] = None\nimport arm.tokenizer.flux"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and done.stderr.strip().splitlines()[-1] == "ImportError: arm.tokenizer.flux needs diffusers and peft; install them with: pip install 'arm[flux]'"


def test_importing_the_module_loads_neither_library():
    done = subprocess.run([sys.executable, "-c", "import sys, arm.tokenizer.fluxtune; print(*sorted({'diffusers', 'peft', 'transformers'} & set(sys.modules)))"], capture_output=True, text=True, check=True)
    assert not done.stdout.strip()


# ---- what is trained keeps its precision, and adapters reach what carries the tokens ------------------------------------------

@pytest.mark.parametrize("trainable", ("lora", "full"))
def test_small_steps_are_not_lost_in_bfloat16(trainable, folder, features):
    schedule(folder, "flux", use_dynamic_shifting=False, shift=1.)
    flux = make_renderer(replace(RendererConfig.tiny(), trainable=trainable), features, str(folder/"flux"), local_only=True)
    assert {p.dtype for p in flux.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in flux.transformer.parameters() if not p.requires_grad} == ({torch.bfloat16} if trainable == "lora" else set())
    learned = {k: p for k, p in flux.transformer.named_parameters() if p.requires_grad and "lora_A" not in k}
    old = {k: p.detach().clone() for k, p in learned.items()}
    optimizer = torch.optim.AdamW(learned.values(), 1e-5, weight_decay=0.)
    for _ in range(2):
        flow_loss(flux, pictures((2, 4)), tokens((2, 4)), (2, 4), make_generator(0, "loss")).backward()
        optimizer.step()
    asked = [k for k, p in learned.items() if p.grad is not None and p.grad.abs().max() > 1e-6]
    assert len(asked) > 10 and all((learned[k] != old[k]).any() for k in asked)
    assert flux.render(tokens((2, 4)), (2, 4), steps=1).isfinite().all()


def test_adapters_sit_on_both_streams(features):
    flux = make_renderer(replace(RendererConfig.tiny(), trainable="lora"), features)
    adapted = {k.split(".lora_A")[0].rsplit(".attn.", 1)[-1] for k, _ in flux.transformer.named_parameters() if "lora_A" in k}
    assert adapted == {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}


def test_a_folder_of_others_is_not_replaced_and_a_broken_write_leaves_what_was_there(features, tmp_path, monkeypatch):
    renderer, place = make_renderer(RendererConfig.tiny(), features), tmp_path/"flux"
    save_renderer(renderer, place)
    before = (place/"mapping.safetensors").read_bytes()
    step(renderer)
    from arm.tokenizer import fluxtune
    def full(path, data): raise OSError("no space left")
    monkeypatch.setattr(fluxtune, "save_json", full)
    with pytest.raises(OSError, match="no space"): save_renderer(renderer, place)
    assert (place/"mapping.safetensors").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["flux"]
    (place/"notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="a folder of its own"): save_renderer(renderer, place)
