"""Quantizers behind one interface: exact codes, honest gradients, resumable codebooks, and the same codes as a known library."""
from dataclasses import replace

import pytest
import torch
from arm.core import make_generator, seeded
from arm.tokenizer.model import TokenizerConfig, VisualTokenizer
from arm.tokenizer.quantizers import BSQ, QUANTIZERS, PlainFSQ, ResidualVQ, TextbookFSQ, VectorQuantizer, find_codes, make_quantizer

EVERY = list(QUANTIZERS)
LEARNED = ["vq", "vq_plain", "rvq"]


def latents(n, width, *stream): return torch.randn(n, width, generator=make_generator(0, "latents", *stream))


def make(name, bits=8, trained=3, seed=0):
    "A quantizer whose codebook has seen some batches."
    with seeded(seed, name): q = make_quantizer(name, bits, n_channel=6)
    for step in range(trained): q.with_loss(latents(200, q.n_channel, step))
    return q


@pytest.mark.parametrize("name", EVERY)
def test_codes_survive_the_way_to_indices_and_back(name):
    q = make(name)
    z = latents(300, q.n_channel, "other").reshape(3, 100, -1) * 2
    codes = q(z)
    indices = q.codes_to_indices(codes)
    assert codes.shape == z.shape and codes.dtype == torch.float32
    assert indices.shape == (3, 100) and indices.dtype == torch.int64 and 0 <= indices.min() and indices.max() < q.codebook_size
    assert torch.equal(q.indices_to_codes(indices), codes)
    every = torch.arange(q.codebook_size)
    assert torch.equal(q.indices_to_codes(q.codes_to_indices(q.indices_to_codes(every))), q.indices_to_codes(every))
    if name != "vq_plain": assert torch.equal(q.codes_to_indices(q.indices_to_codes(every)), every)


@pytest.mark.parametrize("name", EVERY)
def test_autocast_changes_no_code(name):
    q = make(name)
    z = latents(300, q.n_channel, "autocast")
    with torch.autocast("cpu", torch.bfloat16): codes = q(z); indices = q.codes_to_indices(codes)
    assert torch.equal(codes, q(z)) and torch.equal(indices, q.codes_to_indices(q(z)))


@pytest.mark.parametrize("name", EVERY)
def test_forward_is_pure_and_with_loss_gives_the_same_codes(name):
    q = make(name)
    before = {k: v.clone() for k, v in q.state_dict().items()}
    z = latents(50, q.n_channel, "pure")
    codes = q(z)
    again, loss = q.eval().with_loss(z)
    assert torch.equal(codes, again) and loss.shape == () and loss.isfinite()
    assert all(torch.equal(v, before[k]) for k, v in q.state_dict().items())


@pytest.mark.parametrize("name", EVERY)
def test_gradients_reach_the_latents(name):
    q = make(name)
    z, pull = latents(50, q.n_channel, "gradient").requires_grad_(), latents(50, q.n_channel, "pull")
    codes, loss = q.with_loss(z)
    passed, = torch.autograd.grad((codes * pull).sum(), z, retain_graph=True)
    assert passed.isfinite().all()
    if name in LEARNED:
        assert torch.equal(passed, pull)
        assert torch.autograd.grad(loss, z)[0].abs().sum() > 0
    if name == "fsq": assert torch.allclose(passed, pull * (1 - torch.tanh(z)**2))
    if name.startswith("bsq"): assert torch.allclose((passed * z).sum(-1), torch.zeros(50), atol=1e-5)
    if name == "bsq_entropy": assert torch.autograd.grad(loss, z)[0].abs().sum() > 0


def test_the_usual_bound_lets_through_a_thousandth_at_two_levels():
    slopes = []
    for q in (TextbookFSQ((2,)), PlainFSQ((2,))):
        z = torch.zeros(1, 1, requires_grad=True)
        slopes.append(torch.autograd.grad(q(z).sum(), z)[0].item())
    assert 900 < slopes[1] / slopes[0] < 1100


@pytest.mark.parametrize("name", EVERY)
def test_state_is_saved_and_training_goes_on_as_if_nothing_had_happened(name):
    q = make(name)
    with seeded(9, "other start"): copy = make_quantizer(name, 8, n_channel=6)
    copy.load_state_dict(q.state_dict())
    for step in range(3, 12):
        z = latents(200, q.n_channel, step)
        (a, x), (b, y) = q.with_loss(z), copy.with_loss(z)
        assert torch.equal(a, b) and torch.equal(x, y)
    assert all(torch.equal(v, copy.state_dict()[k]) for k, v in q.state_dict().items())


def test_dead_entries_come_back_and_living_ones_stay():
    q = VectorQuantizer(32, 4, patience=2.)
    q.with_loss(latents(64, 4))
    near = q.codebook[:4].clone()
    for _ in range(3): q.with_loss(near.repeat(8, 1)) # 96 vectors that choose four entries only
    assert (q.idle[:4] == 0).all() and (q.idle[4:] > 0).any()
    moved = q.restart(latents(64, 4, "new"))
    assert len(moved) and not set(moved.tolist()) & {0, 1, 2, 3}


def test_a_codebook_is_not_trained_by_several_processes(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="2 processes: codebooks would drift apart"): make_quantizer("rvq", 8).with_loss(latents(10, 16))
    assert make_quantizer("rvq", 8).eval().with_loss(latents(10, 16))[1].isfinite()
    assert make_quantizer("bsq", 16).with_loss(latents(10, 16))[1] == 0


def test_equal_latents_give_birth_to_one_entry():
    q = VectorQuantizer(8, 4)
    assert len(q.restart(torch.ones(100, 4))) == 1


def test_equal_and_nearly_equal_entries_are_found():
    crowd = 3 + 1e-6 * latents(100, 8)
    crowd[50:] = crowd[:50]
    assert torch.equal(crowd[find_codes(crowd, crowd)], crowd)


def test_one_batch_of_fewer_rows_than_a_piece_and_none():
    q = make("vq")
    assert q(torch.zeros(0, 6)).shape == (0, 6) and q.codes_to_indices(torch.zeros(0, 6)).shape == (0,)
    assert q(torch.zeros(6)).shape == (6,) and q.codes_to_indices(q(torch.zeros(6))).shape == ()


@pytest.mark.parametrize("levels", [(2,) * 16, (4,) * 8, (8, 8, 8, 5, 5, 5), (3, 2, 7)])
def test_codes_are_those_of_the_known_library(levels):
    library = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed; `make test-peers` installs it")
    z = latents(2000, len(levels), "library")[None] * 2
    pairs = [(PlainFSQ(levels), library.FSQ(levels=list(levels), preserve_symmetry=True))]
    if 2 not in levels: pairs.append((TextbookFSQ(levels), library.FSQ(levels=list(levels)))) # it refuses two levels without symmetry
    for ours, other in pairs:
        codes, indices = other(z)
        assert torch.allclose(ours(z), codes, atol=1e-6) and torch.equal(ours.codes_to_indices(ours(z)), indices.long())
        assert torch.allclose(ours.indices_to_codes(indices.long()), other.indices_to_codes(indices), atol=1e-6)
        x, y = z.clone().requires_grad_(), z.clone().requires_grad_()
        ours(x).sum().backward(); other(y)[0].sum().backward()
        assert torch.allclose(x.grad, y.grad, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_the_tokenizer_takes_any_of_them(name):
    q = make(name)
    cfg = replace(TokenizerConfig.tiny(), levels=(2,) * q.n_channel, stages=(), down_dim=32, up_dim=32, up_layer=1)
    with seeded(0, "tokenizer"): t = VisualTokenizer(cfg).eval()
    t.fsq = q.eval()
    images = latents(2 * 3 * 16 * 24, 1, "images").reshape(2, 3, 16, 24).clamp(-1, 1)
    indices = t.encode(images)
    assert indices.shape == (2, 6) and indices.max() < q.codebook_size
    assert torch.equal(q.indices_to_codes(indices), t.quantise(images))
    assert t.decode(indices, (2, 3), steps=1).shape == images.shape


@pytest.mark.parametrize("call, says", [
    (lambda: make_quantizer("lfq"), "choose one of fsq"),
    (lambda: make_quantizer("vq", 1), "choose 2 to 20"),
    (lambda: make_quantizer("fsq_4", 7), "choose an even number"),
    (lambda: make_quantizer("fsq_mixed", 11), "choose one of them"),
    (lambda: VectorQuantizer(1), "at least 2 entries"),
    (lambda: VectorQuantizer(8, learn="adam"), "choose 'ema' or 'gradient'"),
    (lambda: ResidualVQ(()), "between one and 2\\*\\*20 sums"),
    (lambda: ResidualVQ((4096, 4096)), "use smaller or fewer"),
    (lambda: BSQ(8).indices_to_codes(torch.tensor([256])), "is a text id among them"),
    (lambda: VectorQuantizer(8).indices_to_codes(torch.tensor([-1])), "is a text id among them"),
    (lambda: ResidualVQ((4, 4)).indices_to_codes(torch.tensor([.5])), "integers are needed"),
])
def test_mistakes_are_named(call, says):
    with pytest.raises(ValueError, match=says): call()
