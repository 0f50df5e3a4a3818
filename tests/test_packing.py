"""Packing as a whole: rows that are full, results that are a document's own, and costs that follow the documents."""
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from arm.core import make_generator, make_rng, seeded
from arm.model.packing import best_rows, buckets, document_blocks, even_rows, fill, packed_forward, row_batch, within_documents
from arm.model.sequence import IGNORE, ImagePrompt, image_sample, pack, pad_batch, text_sample
from arm.model.transformer import ARM, ARMConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from itertools import combinations, count, islice

CFG = replace(ARMConfig.tiny(), dim=32, n_layer=2, n_head=4, n_kv_head=2, ffn_dim=48, text_size=300)
VOCAB = CFG.vocab


def model(cfg=CFG):
    with seeded(0, "packing"): return ARM(cfg)


def documents(n, seed=0):
    "Texts and pictures of many lengths, some longer than a bucket's step."
    rng, g = make_rng(seed, "documents"), make_generator(seed, "codes")
    words = lambda: [rng.randrange(300) for _ in range(rng.randint(0, 70))]
    def one(i):
        if i % 3 == 0: return text_sample(VOCAB, words())
        h, w = rng.randint(1, 9), rng.randint(1, 9)
        return image_sample(VOCAB, ImagePrompt(words(), (h, w)), torch.randint(2**16, (h * w,), generator=g))
    return [one(i) for i in range(n)]


def gradients(m, batch):
    m.zero_grad()
    loss, _ = m.loss(batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in m.named_parameters()}


# ---- which documents go together ----------------------------------------------------------------------------------------------

@given(st.lists(st.integers(1, 30), max_size=9), st.integers(0, 60))
@settings(max_examples=80, deadline=None)
def test_no_other_choice_fills_a_row_better(lengths, room):
    taken = fill(lengths, room)
    assert len(set(taken)) == len(taken) and sum(lengths[i] for i in taken) <= room
    best = max(s for k in range(len(lengths) + 1) for c in combinations(lengths, k) if (s := sum(c)) <= room)
    assert sum(lengths[i] for i in taken) == best


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 200), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_a_stream_is_packed_whole_and_nobody_waits_for_ever(lengths, room, window):
    rows, seen = list(best_rows(lengths, room, window)), set()
    assert sorted(i for r in rows for i in r) == list(range(len(lengths)))
    for row in rows:
        assert sum(lengths[i] for i in row) <= room
        assert row[0] == min(set(range(len(lengths))) - seen), "the oldest goes first"
        seen |= set(row)


def test_a_stream_may_be_endless_and_no_more_is_read_than_the_window_needs():
    read = []
    def lengths():
        for i in count(): read.append(i); yield 40 + i % 7
    rows = list(islice(best_rows(lengths(), 1000), 50))
    assert len(rows) == 50 and len(read) <= sum(map(len, rows)) + 2 * 64
    assert sum(40 + i % 7 for r in rows for i in r) > .998 * 50 * 1000


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_rows_of_a_step_are_even(lengths, n):
    rows = even_rows(lengths, n)
    held = [sum(lengths[i] for i in r) for r in rows]
    assert len(rows) == n and sorted(i for r in rows for i in r) == list(range(len(lengths)))
    assert max(held) - min(held) <= max(lengths, default=0)


# ---- packed = unpacked --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients_equal_those_of_single_documents(seed):
    some, m = documents(14, seed), model()
    loss, alone = gradients(m, pad_batch(VOCAB, some))
    within_documents(m)
    forms = dict(one_row=[row_batch(VOCAB, some)], rows=[row_batch(VOCAB, [some[i] for i in r]) for r in even_rows([len(s.input_ids) for s in some], 3)], several=[pack(VOCAB, some, 512)])
    for name, batches in forms.items():
        packed_loss, packed = gradients(m, batches)
        assert (packed_loss - loss).abs() < 1e-5, name
        for n, g in alone.items(): assert (packed[n] - g).abs().max() <= 1e-5 + 1e-4 * g.abs().max(), (name, n)


def test_a_document_does_not_depend_on_its_neighbours():
    first, second, m = documents(6, 1), documents(6, 2), within_documents(model())
    with torch.no_grad():
        outs = []
        for others in (first[1:], second[1:]):
            b = row_batch(VOCAB, [others[0], first[0], *others[1:]])
            outs.append(m(b.input_ids, b.positions, b.doc)[b.doc == 1])
    assert (outs[0] - outs[1]).abs().max() < 1e-5


def test_flex_attention_computes_the_same_on_a_cpu():
    some, m = documents(8), model()
    b = row_batch(VOCAB, some)
    real = b.input_ids != VOCAB.pad
    with torch.no_grad():
        exact = packed_forward(m, b.input_ids, b.positions, b.doc)[real]
        import warnings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore") # it says that it is slow uncompiled
            flexed = packed_forward(m, b.input_ids, b.positions, b.doc, blocks=True)[real]
    assert (exact - flexed).abs().max() < 1e-4


def test_rows_that_are_not_packed_and_copies_of_the_model_go_the_usual_way():
    m, b = model(), pad_batch(VOCAB, documents(4))
    plain = m(b.input_ids)
    within_documents(m)
    assert torch.equal(m(b.input_ids), plain)
    twin = deepcopy(m)
    with torch.no_grad():
        for p in m.parameters(): p.zero_()
    row = row_batch(VOCAB, documents(4))
    assert torch.equal(twin(b.input_ids), plain) and twin(row.input_ids, row.positions, row.doc).abs().sum() > 0, "a copy keeps its own weights"
    assert set(twin.state_dict()) == set(model().state_dict())


def test_bfloat16_stays_close():
    m, b = within_documents(model()), row_batch(VOCAB, documents(6))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): half = m(b.input_ids, b.positions, b.doc)
    with torch.no_grad(): full = m(b.input_ids, b.positions, b.doc)
    real = b.input_ids != VOCAB.pad
    assert half.dtype == torch.bfloat16 and (half.float() - full)[real].abs().mean() < .05 * full[real].abs().mean()


# ---- cost ---------------------------------------------------------------------------------------------------------------------

def test_work_and_memory_grow_with_the_documents_and_not_with_the_row():
    rng, m, kept = make_rng(0, "cost"), within_documents(model(replace(CFG, n_layer=1))), {}
    for n in (8, 16, 32):
        b = row_batch(VOCAB, [text_sample(VOCAB, [rng.randrange(300) for _ in range(126)]) for _ in range(n)])
        assert buckets(b.doc, b.input_ids != VOCAB.pad).scores == n * 128**2
        total = 0
        def count_bytes(t):
            nonlocal total
            total += t.numel() * t.element_size()
            return t
        with torch.autograd.graph.saved_tensors_hooks(count_bytes, lambda t: t): m(b.input_ids, b.positions, b.doc)
        kept[n] = total
    assert 1.9 < kept[16] / kept[8] < 2.1 and 1.9 < kept[32] / kept[16] < 2.1


def test_listed_blocks_grow_with_the_documents():
    listed = lambda n: (lambda m: int(m.kv_num_blocks.sum() + m.full_kv_num_blocks.sum()))(document_blocks(torch.arange(n * 256)[None] // 256))
    assert listed(40) == 2 * listed(20) == 40 * 3


def test_an_empty_row_has_no_label_and_harms_nobody():
    empty, m = row_batch(VOCAB, []), within_documents(model())
    assert (empty.labels == IGNORE).all()
    some = row_batch(VOCAB, documents(5))
    assert torch.equal(m.loss([some, empty])[0], m.loss([some])[0])
    assert torch.equal(m(empty.input_ids, empty.positions, empty.doc), torch.zeros(1, 8, 32))
