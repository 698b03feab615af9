"""A dense checkpoint on disk: what it should hold, what it holds, and one tensor at a time of it."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lost.assemble.load import UNREADABLE, is_classifier_config, some_of, what_went_wrong
from lost.assemble.locate import Place
from lost.model.other_families import PREFIX
from lost.utils.errors import CheckpointError, ConfigError, first_line
from lost.utils.logging import get_logger

log = get_logger(__name__)

INDEX_NAME = "model.safetensors.index.json"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class Stored:
    """One tensor of a file, known from the file's header, by its name there."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class DenseCheckpoint:
    """A released dense model, checked from config and file headers; weights are read one by one.

    Attributes:
        place: where it lies.
        config: of transformers.
        model: the model on the meta device.
        stored: every tensor that the model needs, by name, in the model's order.

    Raises:
        LostError: an architecture without LOST form, a quantised model, or weights that are missing, damaged, of
            another shape or not safetensors.
    """

    def __init__(self, place: Place):
        self.place = place
        if place.kind == "checkpoint":
            raise ConfigError(
                f"source = {place.folder} is a checkpoint of training: export it first,"
                f" lost export source={place.folder} to=<folder>, or name a finished run"
            )
        if place.kind == "adapter":
            raise ConfigError(
                f"source = {place.folder} is an adapter, not a model: add it to its model first, lost export"
                f" source={place.folder} to=<folder> form=dense, and convert that"
            )
        self.config: Any = config_of(place)
        refuse_damaged_generation_config(place)
        self.model = meta_model(self.config, place)
        self.stored = self._needed(by_model_name(self.model, tensors_of(place)))

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from its file."""
        stored = self.stored[name]
        try:
            with safe_open(stored.file, framework="pt") as file:
                return file.get_tensor(stored.name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"source = {self.place.name}: {name} cannot be read: {first_line(error)}") from error

    def _needed(self, found: dict[str, Stored]) -> dict[str, Stored]:
        """The tensors of `found` that the model has, after a comparison with it."""
        wanted = self.model.state_dict()
        tied = set(getattr(self.model, "all_tied_weights_keys", {}) or {})
        missing = [name for name in wanted if name not in found and name not in tied]
        if missing:
            raise CheckpointError(
                f"source = {self.place.name}: its weights lack {some_of(missing)}: the folder is not complete, or not"
                " a causal language model"
            )
        wrong = [
            f"source = {self.place.name}: {name} is {list(found[name].shape)}, and its config.json says"
            f" {list(tensor.shape)}: the weights are not this model's"
            for name, tensor in wanted.items()
            if name in found and found[name].shape != tuple(tensor.shape)
        ]
        if wrong:
            raise CheckpointError("; ".join(wrong[:3]))
        unused = sorted(found.keys() - wanted.keys())
        if unused:
            log.warning("%s holds weights that its model does not use, left out: %s", self.place.name, some_of(unused))
        return {name: found[name] for name in wanted if name in found}


def config_of(place: Place) -> Any:
    """The config of a dense model that has a LOST form.

    Raises:
        ConfigError: unknown, LOST already, or quantised.
    """
    try:
        config: Any = AutoConfig.from_pretrained(place.folder, local_files_only=True, trust_remote_code=False)
    except UNREADABLE as error:
        raise ConfigError(
            f"source = {place.name}: its config.json names no model that transformers knows ({what_went_wrong(error)})"
        ) from error
    model_type = str(config.model_type)
    if model_type.startswith(PREFIX):
        raise ConfigError(f"source = {place.name} is a {model_type} model, in LOST form already: give a dense one")
    if f"{PREFIX}{model_type}" not in CONFIG_MAPPING:
        raise ConfigError(
            f"source = {place.name} is a {model_type} model, of which `lost convert` knows no LOST form; it knows"
            f" {', '.join(convertible())}"
        )
    if is_classifier_config(config):
        raise ConfigError(
            f"source = {place.name} is a text classifier: convert the language model first, then fine-tune it by"
            " `lost finetune task=classification`"
        )
    if getattr(config, "quantization_config", None):
        raise ConfigError(
            f"source = {place.name} is quantised (config.json has quantization_config): give the model in fp32, bf16"
            " or fp16"
        )
    return config


def convertible() -> list[str]:
    """Model types that have a LOST form."""
    return sorted(name.removeprefix(PREFIX) for name in CONFIG_MAPPING if name.startswith(PREFIX))


def refuse_damaged_generation_config(place: Place) -> None:
    """Raises where generation_config.json, which goes along with the model, cannot be read.

    Raises:
        ConfigError: it is cut off, or no settings of generation.
    """
    if not (place.folder / "generation_config.json").is_file():
        return
    try:
        GenerationConfig.from_pretrained(place.folder, local_files_only=True)
    except UNREADABLE as error:
        raise ConfigError(
            f"source = {place.name}: its generation_config.json cannot be read ({what_went_wrong(error)}): fetch it"
            " again, or remove it"
        ) from error


def meta_model(config: Any, place: Place) -> PreTrainedModel:
    """The model without memory.

    Raises:
        ConfigError: sizes that make no model.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except UNREADABLE as error:
        raise ConfigError(
            f"source = {place.name}: the sizes in its config.json make no model ({what_went_wrong(error)})"
        ) from error


def tensors_of(place: Place) -> dict[str, Stored]:
    """Every tensor of the folder's safetensors files by name, from their headers.

    Raises:
        CheckpointError: no such files, or one that is missing or damaged.
    """
    found: dict[str, Stored] = {}
    for file in weight_files(place):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    header = opened.get_slice(name)
                    found[name] = Stored(file, name, tuple(header.get_shape()), str(header.get_dtype()))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"source = {place.name}: {file.name} cannot be read: {first_line(error)}. It is damaged or cut off:"
                " fetch it again"
            ) from error
    return found


def by_model_name(model: PreTrainedModel, found: dict[str, Stored]) -> dict[str, Stored]:
    """The tensors by the names that they have in the model: some families' files name them otherwise."""
    renamings = [rule for rule in get_model_conversion_mapping(model) or [] if isinstance(rule, WeightRenaming)]
    wanted: Any = model.state_dict()
    return {
        rename_source_key(name, renamings, [], model.base_model_prefix, wanted)[0]: stored
        for name, stored in found.items()
    }


def weight_files(place: Place) -> list[Path]:
    """The files of a checkpoint: model.safetensors, else those of its index, else a whole set of shards.

    Where a folder has both, transformers takes model.safetensors too.

    Raises:
        CheckpointError: none, or not all.
    """
    folder = place.folder
    if (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif (folder / INDEX_NAME).is_file():
        names = sorted(set(read_index(folder / INDEX_NAME, place).values()))
    else:
        names = all_shards(path.name for path in folder.glob("*.safetensors"))
    if not names:
        has_pickle = any(folder.glob("pytorch_model*.bin"))
        raise CheckpointError(
            f"source = {place.name} has no model.safetensors: "
            + (
                "its weights are pickles (pytorch_model.bin), which can run code when they are loaded; write them as"
                " safetensors with transformers' save_pretrained"
                if has_pickle
                else "it is not complete"
            )
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"source = {place.name} lacks {some_of(missing)} of {len(names)} weight files: fetch the missing shards"
        )
    return [folder / name for name in names]


def read_index(file: Path, place: Place) -> dict[str, str]:
    try:
        weight_map = dict(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
        outside = [name for name in weight_map.values() if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"source = {place.name}: {file.name} is no index of weights ({error!r})") from error
    if outside:
        raise CheckpointError(f"source = {place.name}: {file.name} names {outside[0]}, which is not in its folder")
    return weight_map


def all_shards(names: Iterable[str]) -> list[str]:
    """The names of a whole set of shards, of which `names` has at least one; empty: it has none."""
    shards = [match for match in map(_SHARD.fullmatch, names) if match]
    if not shards:
        return []
    count = int(shards[0][2])
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
