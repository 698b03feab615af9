"""Loads the model and the tokenizer that `source=` names."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lost.assemble.adapter import add_stored_adapter, base_of, merged, read_adapter_facts
from lost.assemble.locate import Place, locate
from lost.checkpoint.io import read_json
from lost.checkpoint.manifest import verify
from lost.checkpoint.shards import read_whole
from lost.config.schema import PretrainConfig
from lost.config.section import build
from lost.export import CLASSIFIER
from lost.model import LostLlamaConfig, LostLlamaForCausalLM
from lost.model.build import llama_config
from lost.utils.errors import CheckpointError, ConfigError, LostError, first_line
from lost.utils.logging import get_logger
from lost.utils.quiet import quiet_libraries

log = get_logger(__name__)

# What transformers raises where a file of a model is damaged, or its values have another type or make no model.
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to use.

    Attributes:
        model: in eval mode, on the device asked for.
        tokenizer: the one it was trained with.
        origin: folder or hub id that the weights were read from.
        place: where that is and which run made it.
        layers_with_adapter: names of layers beside which an adapter stays, because it cannot be added to them.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    origin: str
    place: Place
    layers_with_adapter: tuple[str, ...] = ()


def refuse_adapter_beside(loaded: Loaded, fix: str) -> None:
    """Raises where no plain model is what `source` is.

    Args:
        fix: what to do instead.
    Raises:
        ConfigError: an adapter that cannot be added to its layers.
    """
    left = loaded.layers_with_adapter
    if left:
        raise ConfigError(
            f"source = {loaded.origin}: its adapter cannot be added to {len(left)} layers such as {left[0]}, which are"
            f" LOST or have an activation between; {fix}"
        )


def load_model(source: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Loaded:
    """The model that `source` names: a run directory (final/ if finished, else the newest complete checkpoint), a
    checkpoint, an exported folder (LOST or any causal language model of transformers), an adapter folder, or a hub id.

    An adapter is added to the layers of its model where that is possible, else it stays beside them.

    Args:
        dtype: of the parameters; None: as they are stored.
    Raises:
        LostError: nothing there, not complete, damaged, or not a causal language model; says what to do.
    """
    place = locate(source)
    tokenizer = load_tokenizer(place)
    if place.kind == "adapter":
        return load_with_adapter(place, tokenizer, device, dtype)
    model = load_checkpoint(place, tokenizer, dtype) if place.kind == "checkpoint" else load_export(place, dtype)
    return Loaded(model.to(device).eval(), tokenizer, place.name, place)  # pyright: ignore[reportArgumentType]


def load_with_adapter(
    place: Place, tokenizer: PreTrainedTokenizerBase, device: torch.device | str, dtype: torch.dtype | None
) -> Loaded:
    """The language model of an adapter folder."""
    facts = read_adapter_facts(place.folder)
    if facts.task == "classification":
        raise LostError(
            f"source = {place.name} is the adapter of a classifier, not of a language model: measure it by `lost"
            " evaluate labelled.files=[...]`, load it in Python by lost.finetune.adapter_folder.load_adapted(folder)"
        )
    base = load_model(base_of(place.folder, facts), "cpu", dtype).model
    model, left = merged(add_stored_adapter(base, place.folder))
    model = model.to(device).eval()
    assert isinstance(model, PreTrainedModel), model
    return Loaded(model, tokenizer, place.name, place, tuple(left))


def load_tokenizer(place: Place) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(place.tokenizer_folder, local_files_only=True, trust_remote_code=False)
    except UNREADABLE as error:
        raise LostError(
            f"source = {place.name}: its tokenizer in {place.tokenizer_folder} cannot be loaded:"
            f" {what_went_wrong(error)}"
        ) from error


def load_checkpoint(place: Place, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model of a checkpoint of ours, verified by its manifest; only the weights are read."""
    tensors = tensors_of(place.folder)
    run_config = config_of_checkpoint(place.folder)
    config = llama_config(run_config.model, run_config.parameterization, special_ids(tokenizer))
    kind = LostLlamaForCausalLM if isinstance(config, LostLlamaConfig) else LlamaForCausalLM
    # Not just any tensor: a learnable gamma is float32 among bfloat16 weights.
    stored = tensors["model.embed_tokens.weight"].dtype
    return from_pretrained(kind, place, None, config=config, state_dict=tensors, dtype=dtype or stored)


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's tensors in a checkpoint, verified; of a method that trains an adapter the trained ones."""
    return read_whole(checkpoint, "model", verify(checkpoint, "model").aliases.get("model", {}))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    return {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


def config_of_checkpoint(folder: Path) -> PretrainConfig:
    """The config of the run of `lost pretrain`, as the checkpoint keeps it."""
    config = settings_in(folder)
    if is_of_finetune(config):
        raise CheckpointError(
            f"{folder} is a checkpoint of `lost finetune`, which only that run goes on from: let it finish (the same"
            " command), then use the model in its final/"
        )
    return build(PretrainConfig, config)


def settings_in(folder: Path) -> dict[str, Any]:
    """The settings of whichever run wrote the checkpoint."""
    facts = read_json(folder / "state.json")
    if not isinstance(facts, dict) or not isinstance(facts.get("config"), dict):
        raise CheckpointError(f"{folder}/state.json holds no run config: it is not a checkpoint of a run")
    return facts["config"]


def is_of_finetune(config: dict[str, Any]) -> bool:
    return "method" in config


def load_export(place: Place, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model of a Hugging Face folder."""
    config = read_config(place)
    if is_classifier_config(config):
        raise LostError(
            f"source = {place.name} is a text classifier, not a language model: `lost finetune task=classification`,"
            " `lost export` and `lost evaluate labelled.files=[...]` take it, and transformers' pipeline uses it"
        )
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise LostError(
            f"source = {place.name} is a {config.model_type} model, which is not a causal language model: give one"
            " that predicts the next token, such as llama or lost_llama"
        )
    return from_pretrained(AutoModelForCausalLM, place, place.folder, config=config, dtype=dtype or "auto")


def is_classifier_config(config: Any) -> bool:
    """Whether a folder's config says that its weights are those of a sequence classifier."""
    return any(name.endswith(CLASSIFIER) for name in getattr(config, "architectures", None) or [])


def read_config(place: Place, **keys: Any) -> Any:
    """The config of a Hugging Face folder, with `keys` in the place of its own.

    Raises:
        LostError: it cannot be read, or says of no model.
    """
    try:
        return AutoConfig.from_pretrained(place.folder, local_files_only=True, trust_remote_code=False, **keys)
    except UNREADABLE as error:
        raise LostError(
            f"source = {place.name}: its config.json names no model that transformers or lost knows"
            f" ({what_went_wrong(error)})"
        ) from error


def from_pretrained(kind: Any, place: Place, folder: Path | None, **options: Any) -> PreTrainedModel:
    """transformers' from_pretrained, with every tensor of the model accounted for.

    Raises:
        LostError: files that cannot be read, or tensors that are missing or of another shape.
    """
    model, info = model_and_info(kind, place, folder, ignore_mismatched_sizes=True, **options)
    if info["missing_keys"]:
        raise LostError(
            f"source = {place.name}: its weights lack {some_of(info['missing_keys'])}: the folder is not complete, or"
            " not a causal language model"
        )
    wrong = [f"{name} is {list(found)} instead of {list(wanted)}" for name, found, wanted in info["mismatched_keys"]]
    if wrong:
        raise LostError(
            f"source = {place.name}: {some_of(wrong)}: its config.json is not that of its weights, or a file is damaged"
        )
    refuse_not_finite(model, place)
    if info["unexpected_keys"]:
        log.warning("%s holds weights that its model does not use: %s", place.name, some_of(info["unexpected_keys"]))
    return model


def refuse_not_finite(model: PreTrainedModel, place: Place) -> None:
    """Raises where a weight is NaN or infinite: nothing that the model says means anything.

    Raises:
        LostError: names the tensors.
    """
    bad = [
        name
        for name, weight in model.named_parameters()
        if not math.isfinite(float(weight.detach().sum(dtype=torch.float32)))
    ]
    if bad:
        raise LostError(
            f"source = {place.name}: {some_of(bad)} hold values that are not finite (NaN or infinity): its training"
            " diverged, or the file is damaged; take an earlier checkpoint"
        )


def model_and_info(kind: Any, place: Place, folder: Path | None, **options: Any) -> tuple[PreTrainedModel, Any]:
    """transformers' from_pretrained, and what it says of tensors that are missing or of another shape.

    Raises:
        LostError: files that cannot be read.
    """
    try:
        with quiet_libraries():
            return kind.from_pretrained(folder, output_loading_info=True, **options)
    except CheckpointError as error:
        # Of a LOST layer.
        raise CheckpointError(f"source = {place.name}: {error}") from error
    except UNREADABLE as error:
        raise LostError(f"source = {place.name}: its weights cannot be loaded: {what_went_wrong(error)}") from error


def what_went_wrong(error: Exception) -> str:
    """An error in one line; the name of one that is not about files or values says more than its words."""
    words = " ".join(str(error).split()) if isinstance(error, StrictDataclassError) else first_line(error)
    return (
        words if isinstance(error, OSError | ValueError | StrictDataclassError) else f"{type(error).__name__}: {words}"
    )


def some_of(names: Iterable[str], limit: int = 3) -> str:
    """The first few names, and how many there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
