"""task=classification: labelled texts to rows, predictions, and what they are worth. N examples, C classes."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lost.assemble.validation import EvaluationLine
from lost.checkpoint import write_text_atomically
from lost.config.finetune import FinetuneConfig
from lost.data.cache import key_of, made_once
from lost.evaluation.perplexity import autocast_to, evaluation_mode
from lost.finetune.labelled import GLUE, Examples, LabelledSets, identity_of, read_labelled
from lost.finetune.metrics import classification_metrics, regression_metrics
from lost.finetune.rows import LabelledRows, is_whole, read_facts, write_facts
from lost.finetune.tokens import PairEncoder, fingerprint_of, pad_id_of
from lost.train.objective import Classification, Regression
from lost.train.runtime import Runtime
from lost.train.trainer import Run
from lost.utils.errors import DataError
from lost.utils.files import cache_folder
from lost.utils.logging import get_logger

log = get_logger(__name__)

# Texts that are tokenised at once.
BATCH_TEXTS = 4096


@dataclass(frozen=True)
class LabelledData:
    """A classification task as rows.

    Attributes:
        train: to train on.
        validation: by name; the first decides which checkpoint is kept.
        test: by name.
        label_names: of label 0, 1, ...; empty: regression.
        largest_id: of all tokens.
        fingerprint: of all that decides the rows.
    """

    train: LabelledRows
    validation: dict[str, LabelledRows]
    test: dict[str, LabelledRows]
    label_names: list[str]
    largest_id: int
    fingerprint: str

    @property
    def objective(self) -> Classification:
        return Classification() if self.label_names else Regression()


def prepare_labelled(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase) -> LabelledData:
    """Rows of every set, from the cache where they are there; several processes may call this at once.

    Raises:
        DataError: as `read_labelled`.
    """
    data, seq_len = config.data, config.train.seq_len
    key = key_of(examples=identity_of(data), tokenizer=fingerprint_of(tokenizer), rows=["labelled", 3, seq_len])
    folder = cache_folder(data.cache_dir) / "examples" / key
    made_once(folder, is_whole, lambda target: write_rows(target, read_labelled(data), tokenizer, seq_len))
    facts = read_facts(folder)
    for name, counts in facts["sets"].items():
        warn_of_cuts(name, counts, "train.seq_len", seq_len)
    rows = {name: LabelledRows(folder, name, facts, pad_id_of(tokenizer)) for name in facts["sets"]}
    validation = {name: rows[name] for name in facts["validation"]}
    test = {name: rows[name] for name in facts["test"]}
    return LabelledData(rows["train"], validation, test, facts["label_names"], facts["largest_id"], key)


def warn_of_cuts(name: str, counts: dict[str, int], key: str, seq_len: int) -> None:
    if counts["cut"]:
        numbers = (counts["cut"], counts["rows"])
        log.warning("%s: %d of %d texts were longer than %s = %d and cut", name, *numbers, key, seq_len)


def write_rows(folder: Path, sets: LabelledSets, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> None:
    """Tokenises every set into `folder`."""
    label_dtype = np.int64 if sets.label_names else np.float32
    counts, largest = {}, 0
    for name, examples in sets.all().items():
        counts[name], largest_here = write_set(folder, name, examples, PairEncoder(tokenizer, seq_len), label_dtype)
        largest = max(largest, largest_here)
    facts = {"sets": counts, "validation": list(sets.validation), "test": list(sets.test), "seq_len": seq_len}
    write_facts(folder, facts | {"label_names": sets.label_names, "largest_id": largest})


def write_set(
    folder: Path, name: str, examples: Examples, encoder: PairEncoder, label_dtype: Any
) -> tuple[dict[str, int], int]:
    """Tokenises one set into `folder`; (its counts, its largest id)."""
    ids, types = encode_all(encoder, examples)
    refuse_empty(ids, examples)
    ends = np.cumsum([len(row) for row in ids], dtype=np.int64)
    np.save(folder / f"{name}_tokens.npy", np.concatenate(ids))
    np.save(folder / f"{name}_ends.npy", ends)
    np.save(folder / f"{name}_labels.npy", np.array(examples.labels, dtype=label_dtype))
    if types:
        np.save(folder / f"{name}_types.npy", np.concatenate(types))
    counts = {"rows": len(ids), "tokens": int(ends[-1]), "cut": encoder.num_cut}
    return counts, max(int(row.max()) for row in ids)


def encode_all(encoder: PairEncoder, examples: Examples) -> tuple[list[np.ndarray], list[np.ndarray]]:
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    for start in range(0, len(examples.texts), BATCH_TEXTS):
        part = slice(start, start + BATCH_TEXTS)
        found, kinds = encoder.encode(examples.texts[part], examples.pairs[part])
        ids += [np.array(row, dtype=np.int32) for row in found]
        types += [np.array(row, dtype=np.int8) for row in kinds]
    return ids, types


def refuse_empty(ids: list[np.ndarray], examples: Examples) -> None:
    for row, place in zip(ids, examples.places, strict=True):
        if not len(row):
            raise DataError(f"{place}: the text is empty: a text without a token has no class; remove the record")


def main_metric(config: FinetuneConfig) -> str:
    """The metric by which checkpoints are compared."""
    if config.evaluation.metric != "auto":
        return config.evaluation.metric
    if config.task != "classification":
        return "loss"
    return GLUE[config.data.glue].metrics[0] if config.data.glue else "accuracy"


def evaluate_labelled(run: Run, data: LabelledData, micro_batch_size: int) -> EvaluationLine:
    """The eval/ fields: those of the first validation set, with several sets also eval/<set>/ of each."""
    results = {
        name: metrics_of(predict(run.engine.model, run.runtime, rows, micro_batch_size), rows, data)
        for name, rows in data.validation.items()
    }
    line: EvaluationLine = {f"eval/{key}": value for key, value in next(iter(results.values())).items()}
    if len(results) > 1:
        line |= {f"eval/{name}/{key}": value for name, part in results.items() for key, value in part.items()}
    return line


def metrics_of(logits: torch.Tensor, rows: LabelledRows, data: LabelledData) -> dict[str, float | int]:
    """Loss and metrics of logits float32 [N, C]."""
    labels = torch.from_numpy(np.array(rows.array("labels")))
    loss = float(data.objective.loss_of(logits, labels)) / len(labels)
    count = {"loss": loss, "examples": len(labels)}
    if not data.label_names:
        return count | regression_metrics(logits.squeeze(1).double().numpy(), labels.double().numpy())
    return count | classification_metrics(logits.argmax(1).numpy(), labels.numpy(), len(data.label_names))


def predict(model: nn.Module, runtime: Runtime, rows: LabelledRows, micro_batch_size: int) -> torch.Tensor:
    """Logits of every row in order, float32 [N, C] on the CPU of every process; the work is split over them."""
    starts = range(0, len(rows), micro_batch_size)
    num_rounds = math.ceil(len(starts) / runtime.num_processes)
    parts: list[torch.Tensor] = []
    # Compiled blocks would be compiled again for every length.
    with (
        torch.compiler.set_stance("force_eager"),
        evaluation_mode(model),
        autocast_to(runtime.device, runtime.autocast_dtype),
    ):
        for turn in range(num_rounds):
            # Wrapped models communicate in their forward: a process without rows of its own repeats the last ones.
            mine = starts[min(turn * runtime.num_processes + runtime.process_index, len(starts) - 1)]
            batch = rows.read(range(mine, min(mine + micro_batch_size, len(rows))))
            inputs = {key: value.to(runtime.device) for key, value in batch.items() if key != "labels"}
            logits = model(**inputs).logits.float()
            padded = logits.new_zeros(micro_batch_size, logits.shape[1])
            padded[: len(logits)] = logits
            parts.append(padded)
    return in_row_order(torch.stack(parts), len(rows), runtime.num_processes, runtime.accelerator.gather)


def in_row_order(table: torch.Tensor, num_rows: int, num_processes: int, gather: Callable[[Any], Any]) -> torch.Tensor:
    """Logits of all processes [rounds, micro_batch_size, C] as [num_rows, C]: rows were dealt out in rounds."""
    if num_processes > 1:
        table = gather(table).view(num_processes, *table.shape).transpose(0, 1)
    return table.reshape(-1, table.shape[-1])[:num_rows].cpu()


def write_predictions(path: Path, logits: torch.Tensor, rows: LabelledRows, label_names: list[str]) -> None:
    """One JSON line an example in the order of its file: prediction, label, probabilities (or the number)."""
    labels = np.array(rows.array("labels")).tolist()
    lines = []
    if label_names:
        probabilities = logits.softmax(1).tolist()
        for best, label, row in zip(logits.argmax(1).tolist(), labels, probabilities, strict=True):
            lines.append({"prediction": label_names[best], "label": label_names[label], "probabilities": row})
    else:
        values = logits.squeeze(1).tolist()
        lines += [{"prediction": value, "label": label} for value, label in zip(values, labels, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
