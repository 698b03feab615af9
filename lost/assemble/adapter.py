"""Adapter folders: what a method other than `full` has trained, and the model that it belongs to."""

import hashlib
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lost.checkpoint.io import read_json
from lost.config.finetune import LoraMethodConfig, LostAdapterMethodConfig, MethodConfig
from lost.config.section import build
from lost.model.adapter import add_lost_adapters, merge_lost_adapters
from lost.model.lora import merge_lora, quiet_peft, register_lost, require_peft
from lost.utils.errors import LostError, first_line

FACTS_NAME = "lost_adapter.json"
# The name that peft gives its file.
WEIGHTS_NAME = "adapter_model.safetensors"
# Values of each tensor that a fingerprint reads.
NUM_SAMPLES = 64


@dataclass(frozen=True)
class AdapterFacts:
    """What lost_adapter.json says.

    Attributes:
        method: the section `method` of the run.
        source: the model that the adapter belongs to, as `source=` takes it.
        fingerprint: of that model's weights.
        task: text, instruction or classification.
        label_names: of a classifier; empty: regression, or no classifier.
    """

    method: dict[str, Any]
    source: str
    fingerprint: str
    task: str
    label_names: list[str]

    @property
    def typed_method(self) -> MethodConfig:
        return build(MethodConfig, self.method)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def is_adapter_folder(folder: Path) -> bool:
    return (folder / FACTS_NAME).is_file()


def read_adapter_facts(folder: Path) -> AdapterFacts:
    """What an adapter folder is.

    Raises:
        LostError: it is not complete, or was written by something else.
    """
    if not (folder / WEIGHTS_NAME).is_file():
        raise LostError(f"{folder} is not complete: it has no {WEIGHTS_NAME}")
    values = read_json(folder / FACTS_NAME)
    try:
        return AdapterFacts(**values)
    except TypeError as error:
        raise LostError(f"{folder / FACTS_NAME} does not describe an adapter: {error}") from error


def base_of(folder: Path, facts: AdapterFacts) -> str:
    """The model that an adapter belongs to, as `source=` takes it.

    Raises:
        LostError: it was a folder that is not there any more.
    """
    if Path(facts.source).is_absolute() and not Path(facts.source).exists():
        raise LostError(
            f"the adapter {folder} belongs to the model {facts.source}, which is not there: bring it back, or write"
            f" where it is now as `source` into {folder / FACTS_NAME}"
        )
    return facts.source


def fingerprint_of(model: PreTrainedModel, without: Collection[str] = ()) -> str:
    """Hash of names, shapes and some values of the weights, the same in every dtype that the model is loaded in.

    Args:
        without: modules that are left out: the head of a classifier.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if is_inside(name, without):
            continue
        flat = tensor.detach().flatten()
        samples = flat[:: max(1, len(flat) // NUM_SAMPLES)][:NUM_SAMPLES].to(torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {list(tensor.shape)}".encode() + samples.cpu().numpy().tobytes())
    return digest.hexdigest()


def is_inside(name: str, modules: Collection[str]) -> bool:
    """Whether a tensor is that of one of the modules or of what is in them, by its name."""
    return any(name.startswith(f"{module}.") for module in modules)


def add_stored_adapter(model: PreTrainedModel, folder: Path, head: Collection[str] = ()) -> nn.Module:
    """The model with the adapter of a folder in place, frozen.

    Args:
        model: the one that the adapter was made for.
        head: modules of a classifier that the folder has whole.
    Raises:
        LostError: another model, or a folder that is not complete.
    """
    facts = read_adapter_facts(folder)
    found = fingerprint_of(model, head)
    if found != facts.fingerprint:
        raise LostError(
            f"the adapter {folder} was made for {facts.source}, whose weights were others than those of this model"
            f" (fingerprint {facts.fingerprint[:12]}, here {found[:12]}): give it the model that it was trained on"
        )
    tensors = read_tensors(folder / WEIGHTS_NAME)
    method = facts.typed_method
    if isinstance(method, LoraMethodConfig):
        return with_lora(model, folder, tensors)
    assert isinstance(method, LostAdapterMethodConfig), method
    add_lost_adapters(model, method, 0, tensors)
    own = {name: value for name, value in tensors.items() if is_inside(name, head)}
    model.load_state_dict(own, strict=False)
    require_all({name for name in model.state_dict() if is_inside(name, head)}, tensors, folder)
    return model.requires_grad_(False)


def with_lora(model: PreTrainedModel, folder: Path, tensors: Collection[str]) -> nn.Module:
    peft = require_peft()
    if not (folder / "adapter_config.json").is_file():
        raise LostError(f"{folder} is not complete: it has no adapter_config.json")
    try:
        config = peft.LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise LostError(f"{folder / 'adapter_config.json'} cannot be read: {first_line(error)}") from error
    register_lost(config)
    with quiet_peft():
        try:
            found = peft.PeftModel.from_pretrained(model, str(folder), config=config, autocast_adapter_dtype=False)
        except KeyError as error:
            raise LostError(f"{folder} is not complete: {WEIGHTS_NAME} lacks {error}") from error
    require_all(set(peft.get_peft_model_state_dict(found)), tensors, folder)
    return found


def require_all(names: set[str], tensors: Collection[str], folder: Path) -> None:
    """Raises where a tensor is missing, whose random start would be taken for what was trained."""
    lacking = sorted(names - set(tensors))
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise LostError(f"{folder} is not complete: {WEIGHTS_NAME} lacks {lacking[0]}{more}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise LostError(f"{path} cannot be read: {error}; the folder is not complete") from error


def merged(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """(the model with its adapters added to their layers, names of layers that keep theirs because they must)."""
    if hasattr(model, "peft_config") and not isinstance(model, PreTrainedModel):
        return merge_lora(model)
    return model, merge_lost_adapters(model)
