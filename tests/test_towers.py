"""Borrowed judges from folders in the published layout: the library's own hidden states for any grid, the words of each folder, and refusals in one clear line."""
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Siglip2ImageProcessor, Siglip2Model, SiglipModel

from arm.core import make_generator, seeded
from arm.data.text import default_tokenizer
from arm.tokenizer.siglip import CaptionReader, ReaderConfig, SiglipTowers, TowersConfig
from arm.tokenizer.towers import NaflexTowers, load_reader, load_towers, patch_lists

BASE = dict(patch_size=8, image_size=32, dim=64, n_layer=3, n_head=4, ffn_dim=96, text_layer=2, text_head=2, text_size=300, text_len=16)
CONFIGS = [TowersConfig(**BASE | c) for c in (dict(), dict(patch_size=4, dim=48, n_head=3, image_size=20), dict(patch_size=16, image_size=48, n_layer=1, ffn_dim=50), dict(n_head=8, text_layer=1, text_len=9))]
GRIDS = ((4, 4), (2, 5), (7, 1), (1, 1), (6, 9))
KINDS = {"fixed": SiglipTowers, "naflex": NaflexTowers}


def shake(model):
    "Norms and biases away from 1 and 0, where a mix-up would not show."
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.05 * torch.randn(p.shape, generator=g))
    return model.eval()


def published(folder, kind, cfg):
    "A random pair of towers as the hub has it: weights, configuration, and words with marks as Gemma's."
    with seeded(0, "towers"): towers = shake(KINDS[kind](cfg))
    towers.model.save_pretrained(folder)
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer, words.normalizer = pre_tokenizers.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "▁")
    words.train_from_iterator(["a red circle above a small blue square"], trainers.BpeTrainer(vocab_size=100, special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"], show_progress=False))
    words.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>").save_pretrained(folder)
    return towers


def pictures(patch): return [torch.randint(0, 256, (3, h * patch, w * patch), generator=make_generator(0, h, w), dtype=torch.uint8) for h, w in GRIDS]


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda c: f"{c.patch_size}px-{c.dim}x{c.n_layer}")
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_hidden_states_equal_the_library_s_for_any_grid(kind, cfg, tmp_path):
    published(tmp_path, kind, cfg)
    ours, theirs = load_towers(tmp_path), (Siglip2Model if kind == "naflex" else SiglipModel).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(ours) is KINDS[kind]
    for p, (h, w) in zip(pictures(cfg.patch_size), GRIDS):
        x = p[None] / 127.5 - 1
        asked = dict(Siglip2ImageProcessor(patch_size=cfg.patch_size, max_num_patches=h * w)(p, return_tensors="pt")) if kind == "naflex" else dict(pixel_values=x, interpolate_pos_encoding=True)
        out = theirs.vision_model(**asked)
        assert ours.features(x).shape == (1, h * w, cfg.dim)
        assert (ours.features(x) - out.last_hidden_state).abs().max() <= 1e-5
        assert (ours.image_embed(x) - out.pooler_output).abs().max() <= 1e-5
    ids = ours.words(["A RED circle", "a red circle " * 20])
    assert ids.shape == (2, cfg.text_len) and (ids == theirs.config.text_config.vocab_size - 1).sum() == 0
    assert (ours.text_embed(ids) - theirs.text_model(input_ids=ids).pooler_output).abs().max() <= 1e-5


@torch.no_grad()
def test_shapes_mix_in_a_batch_and_batch_mates_do_not_matter(tmp_path):
    published(tmp_path, "naflex", CONFIGS[0])
    towers, images = load_towers(tmp_path), [p / 127.5 - 1 for p in pictures(8)]
    for f, im in zip(towers.features_of(images), images): assert (f - towers.features(im[None])[0]).abs().max() <= 1e-5
    features, mask = towers.hidden(images)
    assert (towers.pool(features, mask) - torch.cat([towers.image_embed(im[None]) for im in images])).abs().max() <= 1e-5
    assert patch_lists(images, 8)[1].sum(1).tolist() == [h * w for h, w in GRIDS]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_through_frozen_pooling(kind, tmp_path):
    published(tmp_path, kind, CONFIGS[0])
    towers, f = load_towers(tmp_path), torch.randn(2, 6, 64, requires_grad=True)
    towers.pool(f).square().sum().backward()
    assert f.grad.abs().sum() > 0 and all(p.grad is None and not p.requires_grad for p in towers.parameters())


def test_published_sizes_on_the_meta_device():
    with torch.device("meta"):
        fixed, naflex = SiglipTowers(TowersConfig.paper()), NaflexTowers(TowersConfig(**{**vars(TowersConfig.paper()), "image_size": 256}))
        for side in ((512, 512), (512, 256)):
            assert fixed.features(torch.empty(2, 3, *side)).shape == (2, side[0] * side[1] // 256, 1152)
        assert fixed.text_embed(torch.empty(3, 64, dtype=torch.long)).shape == (3, 1152)
        assert naflex.model.vision_model.embeddings.position_embedding.weight.shape == (256, 1152)
        reader = CaptionReader(ReaderConfig.paper())
        assert reader(torch.empty(1, 1024, 896), torch.empty(1, 9, dtype=torch.long)).shape == (1, 9, 151_936)
    assert sum(p.numel() for p in reader.parameters()) == 494_032_768


@torch.no_grad()
def test_the_reader_reads_as_the_library_does_and_brings_its_own_words(tmp_path):
    with seeded(0, "qwen"): theirs = shake(Qwen2ForCausalLM(Qwen2Config(vocab_size=2100, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                                                     tie_word_embeddings=True, bos_token_id=None, eos_token_id=2099)))
    theirs.save_pretrained(tmp_path)
    default_tokenizer().save(tmp_path / "tokenizer.json")
    reader, prefix = load_reader(tmp_path), torch.randn(2, 7, 48, generator=make_generator(0, "prefix"))
    ids, labels = reader.words(["a red circle", "two green triangles above a cross"])
    logits = theirs(inputs_embeds=torch.cat([prefix, theirs.get_input_embeddings()(ids)], 1)).logits[:, 6:-1]
    assert (reader(prefix, ids) - logits).abs().max() <= 1e-5
    assert (labels == 2099).sum(1).tolist() == [1, 1] and ids[0, -1] == 2099 and labels[0, -1] == -100


def test_what_is_no_judge_is_refused_in_one_line(tmp_path):
    published(tmp_path / "towers", "fixed", CONFIGS[0])
    (tmp_path / "bare").mkdir(); (tmp_path / "bare" / "config.json").write_text('{"model_type": "siglip2"}')
    (tmp_path / "towers" / "tokenizer.json").rename(tmp_path / "kept")
    for load, name, says in ((load_reader, "towers", "model of type 'siglip'"), (load_towers, "nowhere", "is not a folder"), (load_towers, "bare", "cannot be loaded"), (load_towers, "towers", "words cannot be read")):
        with pytest.raises(ValueError, match=says) as e: load(tmp_path / name)
        assert "\n" not in str(e.value)


# ---- the same commands as for the large system --------------------------------------------------------------------------------

def reader_folder(folder):
    "A random Qwen2.5 with our words."
    with seeded(0, "qwen"): Qwen2ForCausalLM(Qwen2Config(vocab_size=2100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=2099)).save_pretrained(folder)
    default_tokenizer().save(folder / "tokenizer.json")


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_trained_from_published_folders_by_the_real_command(kind, tmp_path, capsys, monkeypatch):
    from arm.app.cli import main
    from arm.train.borrowed import load_codes
    monkeypatch.setenv("TQDM_DISABLE", "1")
    published(tmp_path / "siglip2", kind, CONFIGS[0])
    reader_folder(tmp_path / "qwen")
    name = "siglip2" if kind == "fixed" else "siglip2-naflex"
    for component, folder in ((name, "siglip2"), ("qwen2.5-0.5b", "qwen"), ("qwen2.5-7b", "qwen")):
        assert main(["weights", component, "--folder", str(tmp_path / folder), "--any-size", "--load"]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith("loads: ")
    assert main(["weights", name, "--folder", str(tmp_path / "siglip2")]) == 2
    assert "expected about 1,13" in (err := capsys.readouterr().err) and len(err.splitlines()) == 1
    words = ["train", "codes", "--siglip", str(tmp_path / "siglip2"), "--reader", str(tmp_path / "qwen"), "--preset", "tiny", "--batch", "4", "--out", str(tmp_path / "run")]
    assert main([*words, "--steps", "4", "--every", "2"]) == 0
    tokenizer = load_codes(tmp_path / "run" / "codes", tmp_path / "siglip2")
    images = torch.zeros(1, 3, 16, 24)
    codes = tokenizer.encode(images)
    assert codes.shape == (1, 6) and tokenizer.decode(codes, (2, 3)).shape == images.shape
    assert main([*words[:3], str(tmp_path / "qwen"), *words[4:-1], str(tmp_path / "other")]) == 2 and "model of type 'qwen2'" in capsys.readouterr().err
    assert not (tmp_path / "other" / "codes").exists()


def test_a_broken_off_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch):
    from arm.train import borrowed
    monkeypatch.setenv("TQDM_DISABLE", "1")
    published(tmp_path / "siglip2", "naflex", CONFIGS[0])
    reader_folder(tmp_path / "qwen")
    def run(out, **more): borrowed.train_codes(str(tmp_path / out), str(tmp_path / "siglip2"), str(tmp_path / "qwen"), preset="tiny", steps=4, batch=2, every=2, **more)
    run("whole")
    save = borrowed.LitBorrowed.training_step
    def breaks(self, batch, i):
        if self.global_step == 3: raise KeyboardInterrupt
        return save(self, batch, i)
    monkeypatch.setattr(borrowed.LitBorrowed, "training_step", breaks)
    with pytest.raises((KeyboardInterrupt, SystemExit)): run("halves")
    monkeypatch.setattr(borrowed.LitBorrowed, "training_step", save)
    run("halves")
    a, b = ((tmp_path / out / "codes" / "tokenizer.safetensors").read_bytes() for out in ("whole", "halves"))
    assert a == b


def test_pictures_come_from_shards_and_damage_is_passed_over(tmp_path):
    from PIL import Image
    from arm.core import make_rng
    from arm.train.borrowed import ShardPictures
    from arm.train.convert import convert
    (tmp_path / "src").mkdir()
    for i in range(4):
        Image.new("RGB", (40, 30), (60 * i, 0, 0)).save(tmp_path / "src" / f"{i}.png")
        (tmp_path / "src" / f"{i}.txt").write_text(f"picture {i}")
    convert(tmp_path / "src", tmp_path / "shards")
    batch = ShardPictures(str(tmp_path / "shards"), [(2, 3)], 8)(make_rng(0), 5)
    assert batch.images.shape == (5, 3, 16, 24) and all(t.startswith("picture ") for t in batch.texts)
