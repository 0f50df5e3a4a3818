"""Published folders and ARM: logits of the reference, one tensor in memory at a time, nothing left uninitialised, and refusals in one clear line."""
import json
import math
import weakref
from math import prod

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from arm.core import make_generator, seeded
from arm.model.export import export_hub
from arm.model.gguf import load_gguf, read_gguf
from arm.model.hub import FAMILIES, Growth, empty_model, fill, hub_names, hub_shards, hub_tensors, load_hub, text_logits
from arm.model.layers import ARMConfig
from arm.model.sequence import ImagePrompt, image_sample, pad_batch
from arm.model.transformer import ARM

SMALL = Growth(n_bits=4, max_side=4)
IDS = torch.randint(0, 61, (2, 33), generator=make_generator(0, "ids"))


def reference(kind="qwen2", heads=4, kv=2, tied=True, width=8, layers=2, theta=1e4, eps=1e-6, ffn=40, seed=0):
    "A random model whose norms and biases are not 1 and 0, where a mix-up would not show."
    cls, config = dict(qwen2=(Qwen2ForCausalLM, Qwen2Config), llama=(LlamaForCausalLM, LlamaConfig))[kind]
    with seeded(seed, "reference"):
        model = cls(config(vocab_size=61, hidden_size=heads * width, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv, rms_norm_eps=eps,
                           tie_word_embeddings=tied, rope_parameters=dict(rope_type="default", rope_theta=theta), bos_token_id=None, eos_token_id=3, pad_token_id=None)).eval()
        for n, p in model.named_parameters(): nn.init.normal_(p, mean=float(p.ndim == 1 and n.endswith("norm.weight")), std=.3 if p.ndim == 1 else .12)
    return model


@torch.no_grad()
def apart(theirs, ours): return (theirs(IDS).logits.float() - text_logits(ours, IDS).float()).abs().max().item()


CASES = [dict(), dict(tied=False), dict(heads=6, kv=3, tied=False), dict(heads=7, kv=1), dict(heads=4, kv=4, width=16), dict(heads=1, kv=1, width=32), dict(theta=1e6, layers=3), dict(eps=.05, ffn=97),
         dict(kind="llama"), dict(kind="llama", heads=9, kv=3, tied=False), dict(kind="llama", heads=2, kv=1, width=64, theta=1e5, eps=1e-5)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()) or "plain")
@pytest.mark.parametrize("shard", [None, "20KB"])
def test_logits_equal_the_reference_there_and_back(case, shard, tmp_path):
    theirs = reference(**case)
    theirs.save_pretrained(tmp_path / "a", **(dict(max_shard_size=shard) if shard else {}))
    assert (len(hub_shards(tmp_path / "a")) > 1) == bool(shard)
    ours = load_hub(tmp_path / "a", SMALL)
    assert apart(theirs, ours) <= 1e-4
    export_hub(ours, tmp_path / "b", shard_bytes=9_000 if shard else 10**9, like=tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32).eval()
    assert type(again) is type(theirs) and again.config.eos_token_id == 3
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), again.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), load_hub(tmp_path / "b").state_dict().values()))


def test_bfloat16_survives_the_way_through_float32(tmp_path):
    reference().bfloat16().save_pretrained(tmp_path / "a", max_shard_size="20KB")
    export_hub(load_hub(tmp_path / "a", SMALL), tmp_path / "b", dtype=torch.bfloat16)
    before, after = dict(hub_tensors(tmp_path / "a")), dict(hub_tensors(tmp_path / "b"))
    assert before.keys() == after.keys() and all(x.dtype == after[n].dtype and torch.equal(x, after[n]) for n, x in before.items())
    kept = load_hub(tmp_path / "b", dtype=torch.bfloat16)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert apart(AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32).eval(), load_hub(tmp_path / "b")) <= 1e-4


def test_loading_holds_one_tensor_at_a_time(tmp_path):
    reference(layers=4).save_pretrained(tmp_path, max_shard_size="20KB")
    cfg, alive, peak = load_hub(tmp_path, SMALL).cfg, [], []
    def spied():
        for name, x in hub_tensors(tmp_path):
            alive.append(weakref.ref(x))
            peak.append(sum(r() is not None for r in alive))
            yield name, x
            del x
    fill(empty_model(cfg), spied())
    assert len(alive) == len(hub_names(cfg)) and max(peak) <= 2 # the one before, until its name is bound anew


@pytest.mark.parametrize("growth", [SMALL, Growth(n_bits=6, visual_groups=3, visual_input="sum", visual_pos=True, max_side=4), Growth(n_bits=4, visual_groups=2, visual_input="table", max_side=4)])
@pytest.mark.parametrize("tied", [True, False])
def test_growth_sets_every_number_and_keeps_what_it_promises(growth, tied, tmp_path):
    reference(tied=tied).save_pretrained(tmp_path)
    torch.use_deterministic_algorithms(True) # fresh memory is filled with NaN
    try: model = load_hub(tmp_path, growth)
    finally: torch.use_deterministic_algorithms(False)
    assert all(p.isfinite().all() for p in model.parameters())
    v = model.vocab
    for table in {id(t): t for t in (model.embed.text.weight, model.text_weight)}.values():
        assert torch.equal(table[v.eos], table[3]) and torch.equal(table[v.bos], table[3]) and not table[v.pad].any()
    with torch.no_grad(): p = (model(IDS) @ model.text_weight[:v.n_legal_text].T).softmax(-1)
    assert p[..., v.boi].max() <= 1 / (v.text_size + 1) + 1e-6
    codes = torch.arange(6) % v.codebook_size
    batch = pad_batch(v, [image_sample(v, ImagePrompt([1, 2], (2, 3)), codes)])
    assert math.isclose(model.loss(batch)[1]["visual"].item(), growth.n_bits * math.log(2), rel_tol=1e-5)
    again, other = load_hub(tmp_path, growth), load_hub(tmp_path, Growth(**{**growth.__dict__, "seed": 1}))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert not torch.equal(model.embed.text.weight, other.embed.text.weight)


def test_the_names_of_the_paper_s_model_hold_its_parameters():
    assert sum(prod(p.shape) for p in hub_names(ARMConfig.paper()).values()) == 7_615_616_512
    assert set(FAMILIES) == {"qwen2", "llama"}
    rows = {}
    for place in hub_names(ARMConfig.tiny()).values(): rows.setdefault(place.name, []).append((place.row, place.row + place.shape[0]))
    own = dict(empty_model(ARMConfig.tiny(), device="meta").named_parameters())
    for name, spans in rows.items(): # every row exactly once
        spans.sort()
        assert spans[0][0] == 0 and all(a[1] == b[0] for a, b in zip(spans, spans[1:]))
        assert spans[-1][1] == (2048 if name == "embed.text.weight" else own[name].shape[0])


BROKEN = [(dict(model_type="mistral"), "model_type 'mistral'"), (dict(rope_parameters=None, rope_scaling=dict(rope_type="linear", factor=2.)), "rope scaling 'linear'"),
          (dict(rope_parameters=dict(full_attention=dict(rope_theta=1e4))), "rope scaling"), (dict(use_sliding_window=True), "sliding-window"), (dict(layer_types=["sliding_attention"] * 2), "sliding-window"),
          (dict(head_dim=16), "head_dim 16"), (dict(quantization_config=dict(quant_method="awq")), "quantised"), (dict(vocab_size="61"), "vocab_size"), (dict(num_attention_heads=0), "num_attention_heads"),
          (dict(vocab_size=62), "has shape"), (dict(num_hidden_layers=3), "lacks 12 of"), (dict(num_hidden_layers=1), "no place"), (dict(tie_word_embeddings=False), "lacks 1 of"), (dict(eos_token_id=99), "end_id=99"),
          (dict(rms_norm_eps=-1.), "norm_eps"), (dict(num_key_value_heads=4), "has shape"), (dict(partial_rotary_factor=.5), "partial_rotary_factor")]


@pytest.mark.parametrize("change, says", BROKEN, ids=[s for _, s in BROKEN])
def test_a_config_that_does_not_fit_is_refused_in_one_line(change, says, tmp_path):
    reference().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=says.replace("(", "\\(")) as e: load_hub(tmp_path, SMALL)
    assert "\n" not in str(e.value)


def test_damaged_folders_are_refused_in_one_line(tmp_path):
    model, fresh = reference(), 0
    def folder(change):
        nonlocal fresh
        fresh += 1
        model.save_pretrained(out := tmp_path / str(fresh), max_shard_size="20KB")
        index = json.loads((out / "model.safetensors.index.json").read_text())
        change(out, index)
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
        return out
    first = "model.embed_tokens.weight"
    cases = [(lambda f, i: next(f.glob("*-00002-*")).unlink(), "lacks 1 of"), (lambda f, i: next(f.glob("*-00002-*")).write_bytes(b"x" * 99), "not the whole shard"),
             (lambda f, i: i.pop("weight_map"), "no weight_map"), (lambda f, i: i["weight_map"].update({first: "../other.safetensors"}), "beside the index"),
             (lambda f, i: i["weight_map"].update({first: "model.bin"}), "beside the index"), (lambda f, i: i["weight_map"].pop(first), "lacks 1 of"),
             (lambda f, i: i["weight_map"].update({"more": i["weight_map"][first]}), "the index expects more"), (lambda f, i: (f / "config.json").unlink(), "does not exist"),
             (lambda f, i: (f / "config.json").write_text("{"), "not valid JSON")]
    for change, says in cases:
        with pytest.raises(ValueError, match=says) as e: load_hub(folder(change), SMALL)
        assert "\n" not in str(e.value)


def test_old_folders_with_rotary_constants_and_a_second_copy_of_the_head_load():
    model = reference()
    pairs = [*model.state_dict().items(), ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4))] # tied: the state holds lm_head, too
    cfg = ARMConfig(dim=32, n_layer=2, n_head=4, n_kv_head=2, ffn_dim=40, text_size=61, n_bits=4, max_side=4)
    assert apart(model, fill(ARM(cfg).eval(), pairs)) <= 1e-4 # not an empty one: what a text model does not fill would be left over memory
    with pytest.raises(ValueError, match="tie_word_embeddings"): fill(empty_model(cfg), [(n, x + (n == "lm_head.weight")) for n, x in pairs])


@pytest.mark.parametrize("data", [b"", b"GGUF", b"GGUF\3\0\0\0", b"GGUF\3\0\0\0" + b"\xff" * 64, b"GGUF\3\0\0\0" + bytes(range(256)), b"PK\3\4" + bytes(64), b"GGUF\1\0\0\0" + bytes(64), b"GGUF\3\0\0\0" + bytes(16)])
def test_a_file_that_is_no_gguf_is_refused(data, tmp_path):
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(ValueError): load_gguf(tmp_path / "x.gguf")


def test_random_bytes_after_a_good_start_never_crash_the_reader(tmp_path):
    for seed in range(50):
        noise = torch.randint(0, 256, (200,), generator=make_generator(seed, "noise"), dtype=torch.uint8)
        noise[8 * (seed % 3):][:8] = torch.tensor([2, 0, 0, 0, 0, 0, 0, 0], dtype=torch.uint8)
        (tmp_path / "x.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(noise.tolist()))
        try: read_gguf(tmp_path / "x.gguf")
        except ValueError: pass
