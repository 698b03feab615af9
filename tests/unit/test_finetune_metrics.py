"""GLUE's metrics against their textbook definitions."""

import numpy as np
import pytest

from lost.finetune.metrics import accuracy, classification_metrics, f1, matthews, pearson, ranks, regression_metrics


def drawn(seed, count=63, kinds=2):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, kinds, count)
    predicted = np.where(generator.random(count) < 0.6, labels, generator.integers(0, kinds, count))
    return predicted, labels


@pytest.mark.parametrize("seed", range(4))
def test_f1_is_the_harmonic_mean_of_precision_and_recall_of_label_1(seed):
    predicted, labels = drawn(seed)
    pairs = list(zip(predicted.tolist(), labels.tolist(), strict=True))
    precision = pairs.count((1, 1)) / sum(p == 1 for p, _ in pairs)
    recall = pairs.count((1, 1)) / sum(t == 1 for _, t in pairs)
    assert f1(predicted, labels) == pytest.approx(2 * precision * recall / (precision + recall))
    # The F1 of label 0 is another number.
    assert f1(1 - predicted, 1 - labels) != pytest.approx(f1(predicted, labels), abs=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_matthews_of_two_labels_is_their_correlation(seed):
    predicted, labels = drawn(seed)
    assert matthews(predicted, labels) == pytest.approx(np.corrcoef(predicted, labels)[0, 1])


def test_matthews_of_many_labels_from_the_confusion_matrix():
    predicted, labels = drawn(1, count=101, kinds=4)
    c = np.zeros((4, 4))
    for p, t in zip(predicted, labels, strict=True):
        c[t, p] += 1
    # Gorodkin 2004, as sums over k, l, m.
    kinds = range(4)
    above = sum(c[k, k] * c[i, m] - c[k, i] * c[m, k] for k in kinds for i in kinds for m in kinds)
    left = sum(c[k].sum() * c[[x for x in range(4) if x != k]].sum() for k in range(4))
    right = sum(c[:, k].sum() * c[:, [x for x in range(4) if x != k]].sum() for k in range(4))
    assert matthews(predicted, labels) == pytest.approx(above / np.sqrt(left * right))


def test_metrics_that_are_not_defined_are_zero():
    constant, labels = np.zeros(5, dtype=int), np.array([0, 1, 0, 1, 1])
    assert (f1(constant, labels), matthews(constant, labels)) == (0.0, 0.0)
    assert pearson(np.ones(5), np.arange(5.0)) == 0.0
    assert accuracy(constant, labels) == pytest.approx(0.4)


def test_ranks_share_ties_and_spearman_reads_only_the_order():
    values = np.array([3.0, 1.0, 3.0, 2.0, 3.0])
    assert ranks(values).tolist() == [4.0, 1.0, 4.0, 2.0, 4.0]
    generator = np.random.default_rng(0)
    x = generator.normal(size=31)
    y = x + generator.normal(size=31)
    monotone = regression_metrics(np.exp(x), y)
    assert monotone["spearman"] == pytest.approx(regression_metrics(x, y)["spearman"])
    assert monotone["pearson"] != pytest.approx(regression_metrics(x, y)["pearson"], abs=1e-3)
    assert regression_metrics(x, y)["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])


def test_f1_is_for_two_labels_only():
    assert set(classification_metrics(*drawn(0), 2)) == {"accuracy", "matthews", "f1"}
    assert set(classification_metrics(*drawn(0, kinds=3), 3)) == {"accuracy", "matthews"}
