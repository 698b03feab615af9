"""The model that fine-tuning starts from: any source, as a language model or with the head of a classifier."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lost.assemble.load import (
    config_of_checkpoint,
    is_classifier_config,
    load_model,
    load_tokenizer,
    model_and_info,
    read_config,
    refuse_adapter_beside,
    refuse_not_finite,
    some_of,
    special_ids,
    tensors_of,
)
from lost.assemble.locate import Place, locate
from lost.assemble.resume import stored_config
from lost.config.finetune import FinetuneConfig
from lost.finetune.tokens import pad_id_of
from lost.model.build import llama_config
from lost.utils.errors import CheckpointError, ConfigError, LostError
from lost.utils.logging import get_logger
from lost.utils.quiet import quiet_libraries

log = get_logger(__name__)

# Of a run that trains every parameter: what a resume builds the model from, so that the source may be gone.
MODEL_CONFIG = "model_config"
# Layers of an encoder between its blocks and the classifier, which pre-trained checkpoints often lack.
NEW_LAYERS = ("pooler",)
# What stands for the label of a regression.
NUMBER = "a number"
MODEL_OF_ADAPTER = "fine-tune the model that the adapter was made for"


@dataclass(frozen=True)
class Head:
    """The labels of a classifier; no names: one number to regress on."""

    label_names: tuple[str, ...]

    def keys(self) -> dict[str, Any]:
        """What transformers' config says about it."""
        if not self.label_names:
            return {"num_labels": 1, "problem_type": "regression"}
        return {
            "id2label": dict(enumerate(self.label_names)),
            "label2id": {name: number for number, name in enumerate(self.label_names)},
            "problem_type": "single_label_classification",
        }


def tokenizer_of(config: FinetuneConfig) -> PreTrainedTokenizerBase:
    """The source's tokenizer; of a run that goes on, the one in run_dir."""
    own = Path(config.run_dir) / "tokenizer"
    if stored_config(own.parent) and own.is_dir():
        return load_tokenizer(Place("export", own.parent, own, None, str(own)))
    return load_tokenizer(locate(config.source))


def starting_model(config: FinetuneConfig, head: Head | None, dtype: torch.dtype) -> PreTrainedModel:
    """The source's model on the CPU; with `head` as a classifier, whose new weights come from config.seed.

    Raises:
        LostError: the source cannot be read, or is no model for the task.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        if head is None:
            refuse_encoder(config.source)
            loaded = load_model(config.source, "cpu", dtype)
            refuse_adapter_beside(loaded, MODEL_OF_ADAPTER)
            return loaded.model
        place = locate(config.source)
        model = classifier(place, head, dtype)
        fit_head(model, place, head)
        return model


def classifier(place: Place, head: Head, dtype: torch.dtype) -> PreTrainedModel:
    """A sequence classifier on the weights of `place`."""
    if place.kind == "checkpoint":
        return on_own_checkpoint(place, head, dtype)
    if place.kind == "adapter":
        return on_language_adapter(place, head, dtype)
    return on_export(place, head, dtype)


def on_own_checkpoint(place: Place, head: Head, dtype: torch.dtype) -> PreTrainedModel:
    """On the backbone of a checkpoint of `lost pretrain`."""
    tensors = tensors_of(place.folder)
    run = config_of_checkpoint(place.folder)
    config = llama_config(run.model, run.parameterization, special_ids(load_tokenizer(place)))
    config.update(head.keys())
    return loaded_classifier(class_for(config, place), place, None, config=config, state_dict=tensors, dtype=dtype)


def on_language_adapter(place: Place, head: Head, dtype: torch.dtype) -> PreTrainedModel:
    """On a language model that its adapter is added to."""
    loaded = load_model(str(place.folder), "cpu", dtype)
    refuse_adapter_beside(loaded, MODEL_OF_ADAPTER)
    config, tensors = loaded.model.config, loaded.model.state_dict()
    config.update(head.keys())
    return loaded_classifier(class_for(config, place), place, None, config=config, state_dict=tensors, dtype=dtype)


def on_export(place: Place, head: Head, dtype: torch.dtype) -> PreTrainedModel:
    """On a Hugging Face folder: a language model, an encoder, or a classifier already."""
    config = read_config(place, **head.keys())
    options = {"config": config, "dtype": dtype, "ignore_mismatched_sizes": True}
    return loaded_classifier(class_for(config, place), place, place.folder, **options)


def fit_head(model: PreTrainedModel, place: Place, head: Head) -> None:
    """Puts the outputs of a head that `place` has already into the order of the new labels; draws it anew for others.

    Numbers, and names such as LABEL_0, are places in the old order already.
    """
    stored_config = read_config(place) if place.kind == "export" else None
    if not is_classifier_config(stored_config):
        return
    assert stored_config is not None
    stored = label_names_of(stored_config)
    wanted = list(head.label_names) or [NUMBER]
    if len(stored) == len(wanted) and (stored == wanted or are_numbered(stored) or are_numbered(wanted)):
        return
    linears = [module for name in top_modules(model) for module in model.get_submodule(name).modules()]
    linears = [module for module in linears if isinstance(module, torch.nn.Linear)]
    with torch.no_grad():
        if sorted(stored) == sorted(wanted):
            order = [stored.index(name) for name in wanted]
            for tensor in linears[-1].parameters():
                tensor.copy_(tensor[order].clone())
            return
        for linear in linears:
            linear.weight.normal_(0, getattr(model.config, "initializer_range", 0.02))
            if linear.bias is not None:
                linear.bias.zero_()
    log.warning(
        "source = %s classifies into %s, the data into %s: the head starts anew",
        *(place.name, some_of(stored, 5), some_of(wanted, 5)),
    )


def label_names_of(config: Any) -> list[str]:
    """Names of a classifier's label 0, 1, ... as its config has them."""
    return [config.id2label[number] for number in range(config.num_labels)]


def are_numbered(names: list[str]) -> bool:
    """Whether names of labels say nothing but their places."""
    return any(names == [f"{word}{number}" for number in range(len(names))] for word in ("", "LABEL_"))


def class_for(config: Any, place: Place) -> Any:
    """The classifier of a config's family.

    Raises:
        LostError: transformers has none.
    """
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise LostError(
            f"source = {place.name} is a {config.model_type} model, for which there is no text classifier: take a"
            " decoder such as llama or lost_llama, or an encoder such as roberta or bert"
        )
    return AutoModelForSequenceClassification._model_mapping[type(config)]


def loaded_classifier(kind: Any, place: Place, folder: Path | None, **options: Any) -> PreTrainedModel:
    """from_pretrained, where only the head (and an encoder's pooler) may be new.

    Raises:
        LostError: files that cannot be read, or a backbone that is not whole.
    """
    model, info = model_and_info(kind, place, folder, **options)
    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]}
    wrong = backbone_names(model, {*info["missing_keys"], *mismatched})
    if wrong:
        raise LostError(f"source = {place.name}: {some_of(wrong)}: lacking or of another shape: it is not complete")
    refuse_not_finite(model, place)
    return model


def backbone_names(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Those of the names that belong to the pre-trained part of a classifier."""
    prefix = f"{model.base_model_prefix}."
    return [name for name in names if name.startswith(prefix) and not set(name.split(".")) & set(NEW_LAYERS)]


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules of a classifier that are not its pre-trained part: score, classifier, bert.pooler."""
    tops = top_modules(model)
    inner = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in NEW_LAYERS]
    return [name for name in dict.fromkeys(tops + inner) if any(True for _ in model.get_submodule(name).parameters())]


def top_modules(model: PreTrainedModel) -> list[str]:
    """Those beside a classifier's backbone."""
    return [name for name, _ in model.named_children() if name != model.base_model_prefix]


def set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tells a classifier on a decoder which id is padding: it reads the last token that is none."""
    model.config.get_text_config().pad_token_id = pad_id_of(tokenizer)


def save_model_config(model: PreTrainedModel, run_dir: Path) -> None:
    with quiet_libraries():
        model.config.save_pretrained(run_dir / MODEL_CONFIG)


def model_as_stored(run_dir: Path, checkpoint: Path, dtype: torch.dtype, *, is_classifier: bool) -> PreTrainedModel:
    """The model of a run that trains every parameter, from the run directory alone.

    Raises:
        CheckpointError: the run directory does not say what model it is.
    """
    if not (run_dir / MODEL_CONFIG / "config.json").is_file():
        raise CheckpointError(
            f"{checkpoint} holds weights alone, and {run_dir} has no {MODEL_CONFIG}/config.json to say of what model:"
            " resume from a checkpoint inside the directory of its run"
        )
    config = AutoConfig.from_pretrained(run_dir / MODEL_CONFIG, local_files_only=True)
    auto: Any = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    tensors = tensors_of(checkpoint)
    with quiet_libraries():
        return auto._model_mapping[type(config)].from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)


def refuse_encoder(source: str) -> None:
    """Raises where the source cannot write text.

    Raises:
        ConfigError: it is an encoder such as RoBERTa.
    """
    place = locate(source)
    if place.kind != "export":
        return
    config = read_config(place)
    if type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False):
        raise ConfigError(
            f"source = {source} is a {config.model_type} model, an encoder, which writes no text: use it with"
            " task=classification, or take a language model"
        )
