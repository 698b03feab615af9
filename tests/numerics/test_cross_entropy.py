"""Chunked head and cross-entropy against the plain definition: odd sizes, every dtype, autocast, compile, memory."""

from functools import partial

import pytest
import torch
from lost_kernels.cross_entropy import linear_cross_entropy, reference_linear_cross_entropy, token_cross_entropy
from lost_kernels.cross_entropy.op import linear_cross_entropy_op
from lost_kernels.cross_entropy.reference import token_cross_entropy as reference_token_cross_entropy

from lost.bench.live_memory import LiveBytes
from lost.testing.numerics import LIMITS, assert_close, relative_rms_error

# Tokens, hidden size, vocabulary; chunks that divide the tokens, do not, are one token, and hold them all.
SIZES = [(63, 24, 101, 16), (64, 7, 1000, 32), (5, 33, 17, 1), (30, 16, 50, 4096)]


def made(num_tokens, hidden_size, vocab_size, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab_size, hidden_size, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocab_size, (num_tokens,), generator=generator)
    targets[torch.rand(num_tokens, generator=generator) < 0.2] = -100
    targets[-1] = vocab_size - 1
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def with_gradients(function, hidden, weight, targets, scale=0.37):
    loss = function(hidden, weight, targets)
    return loss, *torch.autograd.grad(loss * scale, [hidden, weight])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_is_the_definition(size, dtype):
    *shape, chunk = size
    hidden, weight, targets = made(*shape, dtype=dtype)
    ours = with_gradients(partial(linear_cross_entropy, chunk_tokens=chunk), hidden, weight, targets)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    reference = with_gradients(reference_linear_cross_entropy, *exact, targets)
    for name, own, other in zip(("loss", "d hidden", "d weight"), ours, reference, strict=True):
        assert_close(own, other, str(dtype)[6:], name)
    assert ours[0].dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert [gradient.dtype for gradient in ours[1:]] == [dtype, dtype]


@pytest.mark.parametrize("chunk", [3, 100])
def test_gradcheck(chunk):
    hidden, weight, targets = made(10, 4, 7)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, chunk_tokens=chunk), (hidden, weight)
    )


def test_losses_of_tokens():
    hidden, weight, targets = made(63, 24, 101)
    ours = token_cross_entropy(hidden, weight, targets, chunk_tokens=10)
    assert_close(ours, reference_token_cross_entropy(hidden, weight, targets), "float64")
    assert (ours[targets == -100] == 0).all()
    assert not ours.requires_grad


def test_no_token_with_a_loss():
    hidden, weight, targets = made(9, 4, 7)
    ours = with_gradients(linear_cross_entropy, hidden, weight, torch.full_like(targets, -100))
    assert all((value == 0).all() for value in ours)


@pytest.mark.parametrize("mistake", ["shifted targets", "ignored tokens count", "a chunk is forgotten"])
def test_a_mistake_is_seen(mistake):
    """Negative controls of the comparison above."""
    hidden, weight, targets = made(63, 24, 101, dtype=torch.float32)
    reference = with_gradients(reference_linear_cross_entropy, hidden, weight, targets)
    wrong = targets.roll(1) if mistake == "shifted targets" else targets.clamp(min=0)
    if mistake == "a chunk is forgotten":
        wrong = targets.clone()
        wrong[-16:] = -100
    ours = with_gradients(linear_cross_entropy, hidden, weight, wrong)
    for own, other in zip(ours, reference, strict=True):
        assert relative_rms_error(own, other) > 1000 * LIMITS["float32"]


def test_only_what_is_needed_is_made():
    hidden, weight, targets = made(20, 8, 30)
    for needed in (hidden, weight):
        other = [t.detach() if t is not needed else t for t in (hidden, weight)]
        (ours,) = torch.autograd.grad(linear_cross_entropy(*other, targets), [needed])
        (exact,) = torch.autograd.grad(reference_linear_cross_entropy(*other, targets), [needed])
        assert_close(ours, exact, "float64")
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad


def test_a_second_backward_pass_gives_the_same():
    hidden, weight, targets = made(20, 8, 30)
    loss = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, weight])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_second_derivative_is_refused():
    hidden, weight, targets = made(6, 4, 7)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, targets) * scale
    (first,) = torch.autograd.grad(loss, [hidden], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.square().sum(), [weight])


def test_autocast_is_that_of_a_linear_layer():
    hidden, weight, targets = made(63, 24, 101, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = with_gradients(partial(linear_cross_entropy, chunk_tokens=10), hidden, weight, targets)
        plain = with_gradients(reference_linear_cross_entropy, hidden, weight, targets)
    assert [value.dtype for value in ours] == [torch.float32] * 3
    exact = with_gradients(reference_linear_cross_entropy, hidden, weight, targets)
    for own, other, right in zip(ours, plain, exact, strict=True):
        assert relative_rms_error(own, right) < max(1.2 * relative_rms_error(other, right), 1e-4)
        # Negative control: it did not compute in float32.
        assert relative_rms_error(own, right) > 10 * LIMITS["float32"]


@pytest.mark.parametrize("is_autocast", [False, True])
def test_compiles_whole_for_any_number_of_tokens(is_autocast):
    compiled = torch.compile(
        partial(linear_cross_entropy, chunk_tokens=10), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for num_tokens in (20, 33):
        given = made(num_tokens, 8, 30, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
            ours = with_gradients(compiled, *given)
            eager = with_gradients(partial(linear_cross_entropy, chunk_tokens=10), *given)
        for own, other in zip(ours, eager, strict=True):
            assert own.dtype is other.dtype
            assert_close(own, other, "float32")


def test_opcheck():
    hidden, weight, targets = made(20, 8, 30)
    torch.library.opcheck(linear_cross_entropy_op, (hidden, weight, targets, 6, True, True))
    torch.library.opcheck(linear_cross_entropy_op, (hidden, weight, targets, 6, False, True))


def test_tied_embeddings():
    _, weight, targets = made(20, 8, 30)
    ids = torch.randint(30, (20,))
    ours, exact = (
        torch.autograd.grad(function(weight[ids], weight, targets), [weight])[0]
        for function in (linear_cross_entropy, reference_linear_cross_entropy)
    )
    assert_close(ours, exact, "float64")


def test_the_logits_never_exist_as_a_whole():
    """Beside both gradients a few chunks of logits; the definition keeps three times the logits."""
    num_tokens, hidden_size, vocab_size, chunk = 512, 16, 1000, 32
    given = made(num_tokens, hidden_size, vocab_size, dtype=torch.float32)
    peaks = {}
    for name, function in {
        "ours": partial(linear_cross_entropy, chunk_tokens=chunk),
        "reference": reference_linear_cross_entropy,
    }.items():
        with LiveBytes() as live:
            with_gradients(function, *given)
        peaks[name] = live.peak_bytes
    gradients = 4 * hidden_size * (num_tokens + vocab_size)
    assert peaks["ours"] < 2.5 * gradients + 3 * 4 * chunk * vocab_size
    assert peaks["reference"] > 3 * 4 * num_tokens * vocab_size
