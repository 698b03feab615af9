"""Sliding windows and standard errors against independent definitions."""

import math

import pytest
import torch
import torch.nn.functional as F

from lost.config.data import TextFilesDataConfig
from lost.data.prepared import prepare_validation
from lost.evaluation import SlidingWindows, loss_difference, mean_loss, perplexity, row_sums
from lost.evaluation.errors import ratio
from lost.testing.runs import write_corpus
from lost.testing.tiny import tiny_llama, tiny_tokenizer


class Packed:
    """Rows of one text of random tokens, the last one padded with `pad`."""

    def __init__(self, num_tokens, seq_len, pad=7):
        self.tokens = torch.randint(2, 258, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens))
        self.num_tokens, self.seq_len = num_tokens, seq_len
        self._ids = F.pad(self.tokens, (0, -num_tokens % seq_len), value=pad).view(-1, seq_len)

    def __len__(self):
        return len(self._ids)

    def read(self, indices):
        ids = self._ids[indices]
        labels = F.pad(self.tokens, (0, -self.num_tokens % self.seq_len), value=-100).view(-1, self.seq_len)[indices]
        return {"input_ids": ids, "labels": labels}


def by_definition(model, tokens, window, stride):
    """Each token but the first from the window that has it first: one token at a time, in float64."""
    losses = []
    for place in range(1, len(tokens)):
        # The first window whose end is behind the token.
        number = max(0, math.ceil((place + 1 - window) / stride))
        context = tokens[number * stride : place]
        with torch.no_grad():
            logits = model(context[None], use_cache=False).logits[0, -1].double()
        losses.append(float(F.cross_entropy(logits, tokens[place])))
    return losses


@pytest.mark.parametrize(
    ("num_tokens", "window", "stride"), [(61, 16, 5), (48, 16, 8), (50, 13, 12), (33, 16, 1), (9, 16, 4)]
)
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_perplexity_of_windows_is_that_of_the_definition(num_tokens, window, stride, micro_batch_size):
    model, rows = tiny_llama(), Packed(num_tokens, window)
    expected = by_definition(model, rows.tokens, window, stride)
    windows = SlidingWindows(rows, stride)
    result = perplexity(model, windows, micro_batch_size=micro_batch_size, device="cpu")
    assert result.num_tokens == num_tokens - 1 == len(expected)
    assert result.loss == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    # Negative controls: rows, and another stride, give other numbers on a text of several windows.
    if num_tokens > window:
        assert perplexity(model, rows, micro_batch_size=2, device="cpu").loss != pytest.approx(result.loss, rel=1e-4)


def test_windows_over_prepared_rows_are_one_text(tmp_path):
    """The real rows on disk, padding and all: every token once, in the order of the documents."""
    data = TextFilesDataConfig(validation_files=[str(write_corpus(tmp_path, 5))], cache_dir=str(tmp_path / "cache"))
    tokenizer = tiny_tokenizer()
    sets, _ = prepare_validation(data, vocab_size=258, seq_len=50, tokenizer=tokenizer)
    (rows,) = sets.values()
    windows = SlidingWindows(rows, 20)
    batch = windows.read(list(range(len(windows))))
    text = [int(label) for row in batch["labels"] for label in row if label != -100]
    whole = rows.read(list(range(len(rows))))["labels"].flatten()
    assert text == whole[whole != -100].tolist()
    assert len(text) == rows.num_tokens
    # What a window repeats is what the window before it had at that place.
    assert torch.equal(batch["input_ids"][1, :30], batch["input_ids"][0, 20:])


def test_standard_error_is_that_of_a_bootstrap():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 30, (400,), generator=generator).double()
    amounts = sizes * (3 + torch.randn(400, generator=generator).double())
    draws = torch.randint(400, (4000, 400), generator=generator)
    bootstrap = (amounts[draws].sum(1) / sizes[draws].sum(1)).std()
    found = ratio(amounts, sizes)
    assert found.value == pytest.approx(float(amounts.sum() / sizes.sum()))
    assert found.standard_error == pytest.approx(float(bootstrap), rel=0.1)
    # Of rows of one size it is the textbook's s / sqrt(n).
    equal = ratio(amounts, torch.ones(400).double())
    assert equal.standard_error == pytest.approx(float(amounts.std() / 20))
    assert math.isnan(ratio(amounts[:1], sizes[:1]).standard_error)


def test_paired_differences_are_tighter_and_vanish_for_one_model():
    rows = Packed(600, 16)
    model, other = tiny_llama(), tiny_llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.001)
    options = {"micro_batch_size": 8, "device": "cpu"}
    sums, others = row_sums(model, rows, **options), row_sums(other, rows, **options)
    difference = loss_difference(others, sums)
    assert difference.value == pytest.approx(mean_loss(others).value - mean_loss(sums).value)
    assert 0 < difference.standard_error < mean_loss(sums).standard_error / 10
    assert loss_difference(sums, sums) == type(difference)(0.0, 0.0)
    # Blocks of neighbours: the same mean, another error.
    blocks = mean_loss(sums, 4)
    assert blocks.value == pytest.approx(mean_loss(sums).value)
    assert blocks.standard_error != mean_loss(sums).standard_error
