"""Classifiers that `source=` names, for what comes after their training."""

import torch
from transformers import PreTrainedModel

from lost.assemble.adapter import is_adapter_folder, merged, read_adapter_facts
from lost.assemble.load import Loaded, is_classifier_config, load_tokenizer, read_config
from lost.assemble.locate import Place
from lost.finetune.adapter_folder import load_adapted
from lost.finetune.start import class_for, loaded_classifier


def is_classifier(place: Place) -> bool:
    """Whether a place is a text classifier: by its files, no weights are read."""
    if is_adapter_folder(place.folder):
        return read_adapter_facts(place.folder).task == "classification"
    return (place.folder / "config.json").is_file() and is_classifier_config(read_config(place))


def load_classifier(place: Place, dtype: torch.dtype | None = None) -> Loaded:
    """The classifier, in eval mode on the CPU, an adapter added to its layers where it can be.

    Args:
        dtype: of the parameters; None: as they are stored (beside an adapter: float32).
    Raises:
        LostError: files that are missing or cannot be read, or the adapter is that of another model.
    """
    tokenizer = load_tokenizer(place)
    if place.kind == "adapter":
        model, left = merged(load_adapted(place.folder, dtype))
        assert isinstance(model, PreTrainedModel), model
        return Loaded(model.eval(), tokenizer, place.name, place, tuple(left))
    config = read_config(place)
    model = loaded_classifier(class_for(config, place), place, place.folder, config=config, dtype=dtype or "auto")
    return Loaded(model.eval(), tokenizer, place.name, place)
