"""Perplexity against independent loops: float64 per token, and the papers' evaluator run literally."""

import importlib
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lost.evaluation import perplexity
from lost.evaluation.perplexity import RowSums, lineage_loss, rows_to_read, token_losses
from lost.utils.errors import DataError

# `lost.evaluation.perplexity` names the function: the module behind it has to be asked for.
module_under_test = importlib.import_module("lost.evaluation.perplexity")


class MemoryRows:
    """Rows in memory, with a log of what was read."""

    def __init__(self, labels, **extra):
        self.labels, self.extra, self.reads = labels, extra, []

    def __len__(self):
        return len(self.labels)

    def read(self, indices):
        self.reads.append(list(indices))
        batch = {"input_ids": self.labels[indices].clamp(min=0), "labels": self.labels[indices]}
        return batch | {key: value[indices] for key, value in self.extra.items()}


def padded_rows(num_rows, seq_len=19, vocab=53, seed=0):
    """Random tokens; each row is padded with -100 after a random length (also rows of one token, and of none)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(1, vocab, (num_rows, seq_len), generator=generator)
    lengths = torch.randint(0, seq_len + 1, (num_rows,), generator=generator)
    labels[torch.arange(seq_len) >= lengths[:, None]] = -100
    return labels


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=53,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        initializer_range=0.4,
        attention_dropout=0.3,
    )
    return LlamaForCausalLM(config).eval()


def independent_loss(model, labels):
    """Token by token in float64, from the log of the softmax: (sum, count)."""
    total, count = 0.0, 0
    for row in labels:
        with torch.no_grad():
            logits = model(input_ids=row.clamp(min=0)[None]).logits[0].double()
        for position in range(len(row) - 1):
            if row[position + 1] >= 0:
                total += float(torch.logsumexp(logits[position], 0) - logits[position, row[position + 1]])
                count += 1
    return total, count


def run(model, rows, micro_batch_size=7, **options):
    return perplexity(model, rows, micro_batch_size=micro_batch_size, device="cpu", **options)


def test_exact_loss_equals_a_loop_over_tokens(model):
    labels = padded_rows(37)
    total, count = independent_loss(model, labels)
    result = run(model, MemoryRows(labels))
    assert result.num_tokens == count
    assert result.num_rows == 37
    assert result.loss == pytest.approx(total / count, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    # Negative control: a mean of the rows' means is another number on rows of different lengths.
    means = [independent_loss(model, row[None]) for row in labels]
    mean_of_means = sum(t / c for t, c in means if c) / sum(1 for _, c in means if c)
    assert abs(mean_of_means - result.loss) > 1e-3


def test_loss_agrees_with_the_model_of_transformers(model):
    labels = padded_rows(12)
    with torch.no_grad():
        theirs = model(input_ids=labels.clamp(min=0), labels=labels).loss
    assert run(model, MemoryRows(labels)).loss == pytest.approx(float(theirs), rel=1e-6)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 37, 64])
def test_micro_batch_size_does_not_change_the_result(model, micro_batch_size):
    labels = padded_rows(37)
    expected, other = run(model, MemoryRows(labels)), run(model, MemoryRows(labels), micro_batch_size)
    assert other.loss == pytest.approx(expected.loss, rel=1e-6)
    assert other.perplexity_lineage == pytest.approx(expected.perplexity_lineage, rel=1e-6)
    assert (other.num_tokens, other.num_rows) == (expected.num_tokens, expected.num_rows)


def run_as_processes(model, labels, num_processes, **options):
    """Every process in turn: first each one's own table, then each one again with all tables gathered."""
    tables, results, forwards = [], [], []

    def stop_with(table):
        tables.append(table)
        raise StopIteration

    for process_index in range(num_processes):
        rows = MemoryRows(labels)
        with pytest.raises(StopIteration):
            run(model, rows, process_index=process_index, num_processes=num_processes, gather=stop_with, **options)
        forwards.append(len(rows.reads))
    for process_index in range(num_processes):
        options["gather"] = lambda _: torch.cat(tables)
        results.append(
            run(model, MemoryRows(labels), process_index=process_index, num_processes=num_processes, **options)
        )
    return results, forwards


@pytest.mark.parametrize("num_processes", [2, 3, 7])
def test_process_count_does_not_change_one_bit(model, num_processes):
    labels = padded_rows(37)
    expected = run(model, MemoryRows(labels))
    results, forwards = run_as_processes(model, labels, num_processes)
    assert all(result == expected for result in results)
    # A wrapped model communicates in its forward: unequal counts would wait for ever.
    assert len(set(forwards)) == 1


@pytest.mark.parametrize("num_processes", [1, 2])
def test_max_tokens_takes_the_same_whole_rows_on_any_number_of_processes(model, num_processes):
    labels = padded_rows(37)
    counts = (labels[:, 1:] >= 0).sum(1).cumsum(0)
    max_tokens = int(counts[14])
    num_rows = int((counts < max_tokens).sum()) + 1
    total, count = independent_loss(model, labels[:num_rows])
    if num_processes == 1:
        results = [run(model, MemoryRows(labels), max_tokens=max_tokens)]
    else:
        results, _ = run_as_processes(model, labels, num_processes, max_tokens=max_tokens)
    for result in results:
        assert (result.num_rows, result.num_tokens) == (num_rows, count)
        assert result.loss == pytest.approx(total / count, rel=1e-6)


def test_max_tokens_boundaries():
    labels = torch.ones(600, 5, dtype=torch.int64)
    rows = MemoryRows(labels)
    cases = {1: 1, 4: 1, 5: 2, 1200: 300, 1201: 301, 2400: 600, 9999: 600, 0: 600}
    for rows_at_a_time in (1, 7, 256):
        assert {tokens: rows_to_read(rows, tokens, rows_at_a_time) for tokens in cases} == cases


def literal_lineage_perplexity(model, labels, target_tokens):
    """The evaluators' loop with real batches, one process."""
    evaluated_on_tokens, total_loss, total_batches = 0, torch.tensor(0.0, dtype=torch.float64), 1
    for batch in labels.split(256):
        if evaluated_on_tokens > target_tokens:
            break
        total_batches += 1
        with torch.no_grad():
            total_loss += model(input_ids=batch.clamp(min=0), labels=batch).loss.double()
        evaluated_on_tokens += int((batch != -100).sum())
    return math.exp(total_loss / total_batches), total_batches - 1


# The loop ends once more tokens are counted than the target, before the shift and padding aside: one token less than
# the first batch holds ends it there, as many as it holds do not.
@pytest.mark.parametrize(("target", "num_batches"), [("one less", 1), ("as many", 2), ("never reached", 3)])
def test_lineage_formula_equals_the_papers_loop(model, monkeypatch, target, num_batches):
    labels = padded_rows(700)
    in_first_batch = int((labels[:256] >= 0).sum())
    target_tokens = {"one less": in_first_batch - 1, "as many": in_first_batch, "never reached": 10**7}[target]
    monkeypatch.setattr(module_under_test, "LINEAGE_TARGET_TOKENS", target_tokens)
    expected, batches = literal_lineage_perplexity(model, labels, target_tokens)
    assert batches == num_batches
    result = run(model, MemoryRows(labels), 50)
    assert result.perplexity_lineage == pytest.approx(expected, rel=1e-5)
    assert f"divided by {num_batches + 1}" in result.lineage_note
    assert ("not comparable" in result.lineage_note) == (target == "never reached")
    # Negative control: it is not the exact formula.
    assert result.perplexity_lineage < 0.9 * result.perplexity


def test_lineage_reads_low_by_the_factor_of_its_counter():
    # Equal rows of equal loss: the mean of batch means is the exact loss, so only n / (n + 1) remains.
    num_batches, loss = 40, 2.94
    ones = torch.ones(num_batches * 256, dtype=torch.float64)
    sums = RowSums(loss=ones * loss * 1023, predicted=ones * 1023, labelled=ones * 1024)
    lineage, note = lineage_loss(sums)
    # 10 M tokens / (256 rows x 1024 tokens) = 38.1: the 39th batch passes the target and is the last.
    assert lineage == pytest.approx(loss * 39 / 40, rel=1e-12)
    assert "divided by 40" in note
    assert "not comparable" not in note


def test_labels_shift_by_one(model):
    labels = padded_rows(9)
    shifted = run(model, MemoryRows(labels)).loss
    # The same model asked for the token it just read, instead of the next one.
    with torch.no_grad():
        logits = model(input_ids=labels.clamp(min=0)).logits
    unshifted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert abs(float(unshifted) - shifted) > 1e-2


def test_position_ids_and_mask_reach_the_model(model):
    """Two documents in one row, isolated, have the loss of two rows; without mask and positions they have not."""
    first, second = padded_rows(40)[:, :8].clamp(min=1), padded_rows(40, seed=1)[:, :11].clamp(min=1)
    joined = torch.cat([first, second], dim=1)
    joined[:, 8] = joined[:, 8].clamp(min=1)
    labels = joined.clone()
    labels[:, 8] = -100
    document = torch.tensor([0] * 8 + [1] * 11)
    mask = (document[:, None] == document[None]) & torch.ones(19, 19).tril().bool()
    position_ids = torch.cat([torch.arange(8), torch.arange(11)]).expand(40, -1)

    class Rows(MemoryRows):
        def read(self, indices):
            return super().read(indices) | {"input_ids": joined[indices]}

    isolated = Rows(labels, position_ids=position_ids, attention_mask=mask.expand(40, 1, 19, 19))
    totals = [independent_loss(model, part) for part in (first, second)]
    expected = sum(t for t, _ in totals) / sum(c for _, c in totals)
    assert run(model, isolated).loss == pytest.approx(expected, rel=1e-6)
    assert abs(run(model, Rows(labels)).loss - expected) > 1e-3


@pytest.mark.parametrize("training", [True, False])
def test_training_flag_dropout_and_gradients(model, training):
    labels = padded_rows(8)
    expected = run(model.eval(), MemoryRows(labels)).loss
    model.train(training)
    try:
        assert run(model, MemoryRows(labels)).loss == expected
        assert model.training == training
        assert all(part.training == training for part in model.modules())

        class Failing(MemoryRows):
            def read(self, _):
                raise OSError("disk")

        with pytest.raises(OSError, match="disk"):
            run(model, Failing(labels))
        assert model.training == training
        assert torch.is_grad_enabled()
    finally:
        model.eval()


def test_token_losses_of_many_chunks_equal_one(monkeypatch):
    torch.manual_seed(0)
    logits = torch.randn(5, 7, 11).bfloat16()
    targets = torch.randint(0, 11, (5, 7))
    targets[1, 2:] = -100
    expected = -logits.double().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    monkeypatch.setattr(module_under_test, "CHUNK_VALUES", 3 * 11 + 5)
    losses = token_losses(logits, targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)


def test_autocast_is_close_and_not_the_same(model):
    labels = padded_rows(37)
    exact, rounded = run(model, MemoryRows(labels)), run(model, MemoryRows(labels), autocast=torch.bfloat16)
    assert rounded.loss != exact.loss
    assert rounded.loss == pytest.approx(exact.loss, rel=2e-2)


def test_progress_ends_at_the_number_of_rows(model):
    calls = []
    run(model, MemoryRows(padded_rows(37)), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(7, 37), (14, 37), (21, 37), (28, 37), (35, 37), (37, 37)]


@pytest.mark.parametrize("labels", [torch.full((3, 4), -100), torch.zeros(0, 4, dtype=torch.int64)])
def test_nothing_to_predict_is_an_error(model, labels):
    with pytest.raises(DataError, match="no token to predict"):
        run(model, MemoryRows(labels))


def test_a_huge_loss_is_infinite_perplexity_and_nan_stays_nan():
    def result(loss):
        one = torch.ones(1, dtype=torch.float64)
        return module_under_test.summarise(RowSums(one * loss, one, one))

    assert result(5000.0).perplexity == math.inf
    assert math.isnan(result(math.nan).perplexity)
