"""What a classifier that is there already makes of labelled texts. N texts, C classes."""

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lost.assemble.evaluate import ModelResult
from lost.assemble.load import config_of_checkpoint
from lost.assemble.locate import locate
from lost.config.use import EvaluateConfig
from lost.evaluation.tasks import Measure, TaskResult
from lost.finetune.classification import predict, warn_of_cuts, write_set
from lost.finetune.labelled import read_examples
from lost.finetune.load import is_classifier, load_classifier
from lost.finetune.metrics import f1, matthews
from lost.finetune.rows import LabelledRows
from lost.finetune.start import are_numbered, label_names_of, set_padding
from lost.finetune.tokens import PairEncoder, check_ids, longest_input, pad_id_of
from lost.train.runtime import Runtime
from lost.utils.errors import ConfigError

SET_NAME = "labelled"


def evaluate_classifier(source: str, config: EvaluateConfig, runtime: Runtime) -> ModelResult:
    """Measures a classifier on config.labelled; every process takes its part of the texts.

    Raises:
        LostError: `source` is no classifier of texts, or the data cannot be read or have other labels.
    """
    place = locate(source)
    if place.kind == "checkpoint":
        # Says so itself where the checkpoint is one of fine-tuning.
        config_of_checkpoint(place.folder)
    if not is_classifier(place):
        raise ConfigError(
            f"labelled.files: source = {source} is no text classifier: make one by `lost finetune task=classification`,"
            " or leave labelled.files out"
        )
    loaded = load_classifier(place, runtime.param_dtype)
    model, tokenizer = loaded.model.to(runtime.device), loaded.tokenizer  # pyright: ignore[reportArgumentType]
    set_padding(model, tokenizer)
    model_config: Any = model.config
    names = label_names_of(model_config)
    if len(names) < 2 or model_config.problem_type == "multi_label_classification":
        kind = "a number, not a label," if len(names) < 2 else "several labels, not one,"
        raise ConfigError(f"labelled.files: source = {source} gives {kind} for each text, which is not measured")
    if are_numbered(names):
        names = [str(number) for number in range(len(names))]
    examples = read_examples(config.labelled, names)
    encoder = PairEncoder(tokenizer, min(config.seq_len, longest_input(model_config, tokenizer)))
    with tempfile.TemporaryDirectory(prefix="lost_labelled_") as folder:
        counts, largest = write_set(Path(folder), SET_NAME, examples, encoder, np.int64)
        check_ids(largest, model_config.get_text_config().vocab_size, source)
        facts = {"sets": {SET_NAME: counts}, "seq_len": config.seq_len}
        rows = LabelledRows(Path(folder), SET_NAME, facts, pad_id_of(tokenizer))
        if runtime.is_main:
            warn_of_cuts(source, counts, "seq_len", encoder.seq_len)
        logits = predict(model, runtime, rows, config.evaluation.micro_batch_size)
    result = TaskResult(None, len(examples.labels), measures_of(logits, torch.tensor(examples.labels), names))
    name = f"texts of {', '.join(Path(file).name for file in config.labelled.files)}"
    return ModelResult(source, loaded.origin, {}, {name: result})


def measures_of(logits: torch.Tensor, labels: torch.Tensor, names: list[str]) -> dict[str, Measure]:
    """Loss and metrics of logits float32 [N, C] and labels int64 [N]; those that are means have standard errors.

    F1 is that of the last of two names in alphabetical order, whatever their order in the classifier.
    """
    predicted = logits.argmax(1)
    losses = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    measures = {"loss": mean_of(losses, is_higher_better=False)}
    measures["accuracy"] = mean_of((predicted == labels).double(), is_higher_better=True)
    measures["matthews"] = Measure(matthews(predicted.numpy(), labels.numpy()), math.nan, True)
    if len(names) == 2:
        positive = names.index(max(names))
        value = f1((predicted == positive).long().numpy(), (labels == positive).long().numpy())
        measures[f"f1 of {names[positive]}"] = Measure(value, math.nan, True)
    return measures


def mean_of(scores: torch.Tensor, *, is_higher_better: bool) -> Measure:
    """Mean of scores [N] with its standard error."""
    count = len(scores)
    error = float(scores.std()) / math.sqrt(count) if count > 1 else math.nan
    return Measure(float(scores.mean()), error, is_higher_better, dict(enumerate(scores.tolist())))
