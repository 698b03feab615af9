"""The metrics of GLUE (arXiv 1804.07461), from predictions and labels of a whole set. N examples."""

import numpy as np

HIGHER_IS_BETTER = {
    "loss": False,
    "accuracy": True,
    "f1": True,
    "matthews": True,
    "pearson": True,
    "spearman": True,
}


def measured(num_labels: int) -> list[str]:
    """The metrics of a task with so many labels; 0: regression."""
    if not num_labels:
        return ["loss", "pearson", "spearman"]
    return ["loss", "accuracy", "matthews", *(["f1"] if num_labels == 2 else [])]


def classification_metrics(predicted: np.ndarray, labels: np.ndarray, num_labels: int) -> dict[str, float]:
    """accuracy and matthews, and for two labels f1; predicted and labels are int [N]."""
    metrics = {"accuracy": accuracy(predicted, labels), "matthews": matthews(predicted, labels)}
    return metrics | ({"f1": f1(predicted, labels)} if num_labels == 2 else {})


def regression_metrics(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """pearson and spearman; predicted and labels are float [N]."""
    return {"pearson": pearson(predicted, labels), "spearman": pearson(ranks(predicted), ranks(labels))}


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    return float((predicted == labels).mean())


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN) of label 1, as GLUE has it; 0 where label 1 neither occurs nor is predicted."""
    true_positives = int(((predicted == 1) & (labels == 1)).sum())
    errors = int(((predicted == 1) != (labels == 1)).sum())
    return 2 * true_positives / (2 * true_positives + errors) if true_positives else 0.0


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation, for more than two labels Gorodkin's R_K; 0 where either is constant.

    The covariance of the indicator vectors over the root of the product of their variances.
    """
    count = len(labels)
    kinds = np.union1d(predicted, labels)
    p = (predicted[:, None] == kinds).astype(np.float64)
    t = (labels[:, None] == kinds).astype(np.float64)
    hits = float((p * t).sum())
    p_sums, t_sums = p.sum(0), t.sum(0)
    spread = (count**2 - float(p_sums @ p_sums)) * (count**2 - float(t_sums @ t_sums))
    return (hits * count - float(p_sums @ t_sums)) / spread**0.5 if spread > 0 else 0.0


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Linear correlation; 0 where either is constant."""
    x, y = x - x.mean(), y - y.mean()
    spread = float((x @ x) * (y @ y))
    return float(x @ y) / spread**0.5 if spread > 0 else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """Places in rising order, equal values sharing the mean of theirs: float64 [N]."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[group]
