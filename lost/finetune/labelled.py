"""Labelled texts of files or of GLUE: the sets of a classification task and what its labels are."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lost.config.finetune import FinetuneDataConfig
from lost.config.use import LabelledConfig
from lost.finetune.records import Record, field_of, files_of, hash_of_files, is_held_out, read_records, text_of
from lost.utils.errors import DataError
from lost.utils.hub import is_hub_id, may_be_cached, require_hub
from lost.utils.logging import get_logger

log = get_logger(__name__)

Label = int | float | str


@dataclass(frozen=True)
class GlueTask:
    """Columns and metrics of a task of GLUE (arXiv 1804.07461); the first metric is the one that selects."""

    columns: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    validation: tuple[str, ...] = ("validation",)


GLUE = {
    "cola": GlueTask(("sentence",), ("matthews",)),
    "sst2": GlueTask(("sentence",)),
    "mrpc": GlueTask(("sentence1", "sentence2"), ("accuracy", "f1")),
    "qqp": GlueTask(("question1", "question2"), ("accuracy", "f1")),
    "stsb": GlueTask(("sentence1", "sentence2"), ("pearson", "spearman")),
    "mnli": GlueTask(("premise", "hypothesis"), validation=("validation_matched", "validation_mismatched")),
    "qnli": GlueTask(("question", "sentence")),
    "rte": GlueTask(("sentence1", "sentence2")),
    "wnli": GlueTask(("sentence1", "sentence2")),
}


@dataclass
class Examples:
    """Texts of one set, in the order of its files."""

    texts: list[str] = field(default_factory=list)
    pairs: list[str] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def add(self, place: str, texts: list[str], label: Label) -> None:
        self.texts.append(texts[0])
        self.pairs += texts[1:]
        self.labels.append(label)
        self.places.append(place)


@dataclass(frozen=True)
class LabelledSets:
    """A classification task.

    Attributes:
        train: to train on.
        validation: by name; the first decides which checkpoint is kept.
        test: by name.
        label_names: of label 0, 1, ...; empty: labels are numbers to regress on.
    """

    train: Examples
    validation: dict[str, Examples]
    test: dict[str, Examples]
    label_names: list[str]

    def all(self) -> dict[str, Examples]:
        return {"train": self.train, **self.validation, **self.test}


def read_labelled(data: FinetuneDataConfig) -> LabelledSets:
    """All sets that the settings name, labels as numbers from 0.

    Raises:
        DataError: what cannot be read, a label that is wrong or unknown, an empty set; names file and line.
    """
    sets = _read_glue(data) if data.glue else _read_files(data)
    for name, examples in sets.all().items():
        if not examples.texts:
            raise DataError(
                f"the {name} set has no example: give it more, or set data.validation_files or validation_fraction"
            )
    return sets


def read_examples(labelled: LabelledConfig, label_names: list[str]) -> Examples:
    """Examples for a classifier that is there already, labels as its numbers.

    Args:
        label_names: of the classifier's label 0, 1, ...
    Raises:
        DataError: what cannot be read, or a label that the classifier does not have; names file and line.
    """
    examples = Examples()
    for place, record in read_records(files_of(labelled.files, "labelled.files"), "labelled.files"):
        _add(examples, place, record, labelled, "labelled")
    _number_labels(examples, label_names, of_classifier=True)
    return examples


def identity_of(data: FinetuneDataConfig) -> dict[str, Any]:
    """What decides the examples: contents of files and the settings that pick from them."""
    if data.glue:
        folder = Path(data.glue_dataset).expanduser() / data.glue
        files = sorted(folder.glob("*.parquet"))
        return {"glue": data.glue, "dataset": data.glue_dataset, "files": hash_of_files(files)}
    keys = ("validation_fraction", "text_field", "pair_field", "label_field", "num_labels")
    named = {key: getattr(data, key) for key in ("train_files", "validation_files", "test_files")}
    hashes = {key: hash_of_files(files_of(entries, f"data.{key}")) for key, entries in named.items()}
    return {key: getattr(data, key) for key in keys} | hashes


def _read_files(data: FinetuneDataConfig) -> LabelledSets:
    train, held_out = Examples(), Examples()
    for place, record in _records(data, "train_files"):
        is_out = not data.validation_files and is_held_out(record, data.validation_fraction)
        _add(held_out if is_out else train, place, record, data)
    validation = {"validation": _examples(data, "validation_files") if data.validation_files else held_out}
    test = {"test": _examples(data, "test_files")} if data.test_files else {}
    names = _label_names(train, data.num_labels)
    for examples in (train, *validation.values(), *test.values()):
        _number_labels(examples, names)
    present = set(train.labels)
    never = [name for number, name in enumerate(names) if number not in present]
    if never:
        log.warning("no training example has the label %s: the classifier will never learn it", " or ".join(never[:10]))
    return LabelledSets(train, validation, test, names)


def _records(data: FinetuneDataConfig, key: str) -> Iterator[tuple[str, Record]]:
    return read_records(files_of(getattr(data, key), f"data.{key}"), f"data.{key}")


def _examples(data: FinetuneDataConfig, key: str) -> Examples:
    examples = Examples()
    for place, record in _records(data, key):
        _add(examples, place, record, data)
    return examples


def _add(
    examples: Examples, place: str, record: Record, data: FinetuneDataConfig | LabelledConfig, section: str = "data"
) -> None:
    texts = [text_of(record, data.text_field, f"{section}.text_field", place)]
    if data.pair_field:
        texts.append(text_of(record, data.pair_field, f"{section}.pair_field", place))
    label = field_of(record, data.label_field, f"{section}.label_field", place)
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise DataError(f"{place}: label {label!r} in '{data.label_field}': must be a whole number or a word")
    examples.add(place, texts, label)


def _label_names(train: Examples, num_labels: int) -> list[str]:
    """Names of the labels: the words sorted, or 0 to the largest number.

    Raises:
        DataError: words and numbers mixed, or a single label.
    """
    for label, place in zip(train.labels, train.places, strict=True):
        if not isinstance(label, str) and label < 0:
            raise DataError(f"{place}: label {label} is outside the range: labels are numbered from 0")
    words = sorted({label for label in train.labels if isinstance(label, str)})
    numbers = [label for label in train.labels if not isinstance(label, str)]
    if words and (numbers or num_labels):
        what = f"data.num_labels = {num_labels}" if num_labels else "some labels are whole numbers"
        raise DataError(
            f"{what}, but there are words among the labels ({', '.join(words[:3])}): number all from 0, or name all by"
            " words and leave data.num_labels out"
        )
    if not num_labels and max(numbers, default=0) > len(numbers):
        raise DataError(
            f"the largest label is {max(numbers)} and there are {len(numbers)} training examples: number labels from 0"
            " without gaps, or say how many there are by data.num_labels; does data.label_field name the labels?"
        )
    if num_labels == 1:
        raise DataError("data.num_labels = 1: there is nothing to tell apart; set 2 or more, or leave it out")
    names = words or [str(number) for number in range(num_labels or int(max(numbers, default=0)) + 1)]
    if len(names) < 2:
        raise DataError(f"every training example has the label {names[0]}: there is nothing to tell apart")
    return names


def _number_labels(examples: Examples, names: list[str], *, of_classifier: bool = False) -> None:
    """Turns labels into numbers, in place.

    Args:
        of_classifier: the names are those of a classifier that is there already, not of the training examples.
    Raises:
        DataError: a label that is not among the names; names the line.
    """
    numbers = {name: number for number, name in enumerate(names)}
    for index, (label, place) in enumerate(zip(examples.labels, examples.places, strict=True)):
        if str(label) not in numbers:
            if names == [str(n) for n in range(len(names))]:
                known = f"is outside the range: labels are 0 to {len(names) - 1}"
                fix = "set data.num_labels where the training examples do not have every label"
            else:
                whose = "the classifier" if of_classifier else "the training examples"
                known = f"is not among those of {whose}: {', '.join(names[:10])}"
                fix = "give an example of it to train on"
            fix = "leave the record out" if of_classifier else fix
            raise DataError(f"{place}: label {label} {known}. Mend the label, or {fix}")
        examples.labels[index] = numbers[str(label)]


def _read_glue(data: FinetuneDataConfig) -> LabelledSets:
    """Train and validation splits; the labels of GLUE's own test sets are not public."""
    task = GLUE[data.glue]
    sets, names = {}, []
    for split in ("train", *task.validation):
        records, found = _glue_split(data, split)
        sets[split] = _glue_examples(records, task, f"GLUE {data.glue}, {split}")
        names = names or found
    if data.glue != "stsb" and sets["train"].texts:
        names = names or _label_names(sets["train"], 0)
        for examples in sets.values():
            _number_labels(examples, [str(number) for number in range(len(names))])
    return LabelledSets(sets.pop("train"), sets, {}, names)


def _glue_examples(records: Iterable[Any], task: GlueTask, where: str) -> Examples:
    examples = Examples()
    for number, record in enumerate(records, start=1):
        missing = [key for key in (*task.columns, "label") if key not in record]
        if missing:
            raise DataError(f"{where}: record {number} has no {' and no '.join(missing)}; it has {', '.join(record)}")
        place, label = f"{where}:{number}", record["label"]
        if isinstance(label, bool) or not isinstance(label, int | float) or not math.isfinite(label):
            raise DataError(f"{place}: label {label!r}: must be a number")
        examples.add(place, [text_of(record, column, "the task's column", place) for column in task.columns], label)
    return examples


def _glue_split(data: FinetuneDataConfig, split: str) -> tuple[Iterable[Any], list[str]]:
    """(records, names of the labels where they are known) of a folder, the hub cache or the hub."""
    folder = Path(data.glue_dataset).expanduser() / data.glue
    if folder.is_dir():
        pattern = str(folder / f"{split}-*.parquet")
        return (record for _, record in read_records(files_of([pattern], "data.glue_dataset"), pattern)), []
    if not is_hub_id(data.glue_dataset):
        raise DataError(f"data.glue_dataset = {data.glue_dataset}: there is no folder {folder}, and it is no hub id")
    if not may_be_cached(data.glue_dataset, "dataset"):
        require_hub(
            f"data.glue = {data.glue} is read from {data.glue_dataset}",
            "give a folder: data.glue_dataset=<folder with cola/train-*.parquet, ...>, or your own data.train_files",
        )
    import datasets

    records: Any = datasets.load_dataset(data.glue_dataset, data.glue, split=split)
    return records, list(getattr(records.features["label"], "names", None) or [])
