"""The forms in which a model with LOST layers is written: as it is, as dense matrices, or with its own code."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from lost.model import LostLinear
from lost.utils.errors import ConfigError
from lost.utils.quiet import quiet_libraries

CODE_FILE = Path(__file__).with_name("modeling_lost.py")
# How transformers' classes of text classifiers end.
CLASSIFIER = "ForSequenceClassification"
# Keys of a config that say what the LOST layers are, or who wrote it.
_OWN_KEYS = ("parameterization", "lost_layers", "model_type", "architectures", "auto_map", "transformers_version")


def lost_layers(model: nn.Module) -> dict[str, LostLinear]:
    """The LOST layers of a model by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LostLinear)}


@torch.no_grad()
def dense_model(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of transformers that computes the same: every LOST layer as one matrix.

    The LOST layers of `model` are replaced one after the other, so that it is dense afterwards too.

    Args:
        dtype: of the dense model; None: that of `model`.
    Raises:
        ConfigError: a layer has an activation between its factors, so that no such matrix exists.
    Numerics: each matrix is summed in float64 and rounded once to `dtype`.
    """
    layers = lost_layers(model)
    refuse_activations(layers)
    config, kind = dense_classes(model)
    for name, layer in layers.items():
        weight = layer.dense_weight(dtype)
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.register_parameter("bias", layer.bias)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    with quiet_libraries():
        dense = kind.from_pretrained(None, config=config, state_dict=model.state_dict(), dtype=dtype or model.dtype)
    if model.can_generate():
        dense.generation_config = model.generation_config
    return dense.eval()


def refuse_activations(layers: dict[str, LostLinear]) -> None:
    curved = {name: layer.activation for name, layer in layers.items() if layer.activation != "identity"}
    if curved:
        name, activation = next(iter(curved.items()))
        raise ConfigError(
            f"form = dense: {len(curved)} of {len(layers)} LOST layers have an activation between their factors, for"
            f" instance {name} {activation}, and are no single matrix. Use form=self_contained or form=lost; a model"
            " trained with parameterization.activation=identity has a dense form"
        )


def auto_class(model: PreTrainedModel) -> Any:
    """The class of transformers that loads a folder of the model."""
    is_classifier = type(model).__name__.endswith(CLASSIFIER)
    return AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM


def dense_classes(model: PreTrainedModel) -> tuple[PreTrainedConfig, Any]:
    """The config of the architecture that a LOST model type extends, with the same values, and its model class."""
    known, config = auto_class(model)._model_mapping, model.config
    (base, *_) = (kind for kind in type(config).__mro__[1:] if kind in known and kind.model_type != config.model_type)
    values = {key: value for key, value in config.to_dict().items() if key not in _OWN_KEYS}
    return base(**values), known[base]


def describe_layers(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """What modeling_lost.py needs to know of every LOST layer, as JSON values."""
    return {
        name: {
            "rank": layer.lost_rank,
            "num_kept": layer.num_kept,
            "axis": layer.selection_axis,
            "activation": layer.activation,
            "gamma": "learnable" if isinstance(layer.gamma, nn.Parameter) else layer.gamma,
            "bias": layer.bias is not None,
        }
        for name, layer in lost_layers(model).items()
    }


def code_of(model: PreTrainedModel) -> tuple[str, str]:
    """(name, text) of the Python file that runs the model without `lost`; config.json is told of it."""
    config = model.config
    dense_config, kind = dense_classes(model)
    names = {
        "LlamaForCausalLM": kind.__name__,
        "LlamaConfig": type(dense_config).__name__,
        "lost_llama": config.model_type,
    }
    text = CODE_FILE.read_text(encoding="utf-8")
    for word, name in names.items():
        text = text.replace(word, name)
    module = f"modeling_{config.model_type}"
    config.lost_layers = describe_layers(model)
    config.auto_map = {
        "AutoConfig": f"{module}.Lost{names['LlamaConfig']}",
        "AutoModelForCausalLM": f"{module}.Lost{names['LlamaForCausalLM']}",
    }
    return f"{module}.py", text


def forget_code(config: PreTrainedConfig) -> None:
    """Takes out of a config what names a Python file beside it: of a folder that had one, saved without it."""
    for key in ("auto_map", "lost_layers"):
        vars(config).pop(key, None)
