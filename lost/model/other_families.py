"""LOST forms of further decoders of transformers: lost_mistral, lost_qwen2, ...

One rule makes them all: the family's own classes are built on the meta device and their linears swapped there.
"""

from typing import Any, ClassVar

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from lost.model.families import Shell, WithLostLayers, WithParameterization, swap_linears

PREFIX = "lost_"
OTHER_FAMILIES = (
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "olmo",
    "olmo2",
    "smollm3",
    "gpt_neox",
    "phi",
    "phi3",
)


class LostBackbone(WithLostLayers):
    """Of a family's backbone; goes before it among the bases."""

    def __init__(self, config: Any, *, is_part_of_causal_lm: bool = False):
        device = torch.get_default_device()
        with torch.device("meta"):
            super().__init__(config)  # pyright: ignore[reportCallIssue]
            if not is_part_of_causal_lm:
                swap_linears(Shell(self), config)  # pyright: ignore[reportArgumentType]
        self._materialise(device)


class LostCausalLM(WithLostLayers):
    """Of a family's causal language model; goes before it among the bases."""

    backbone_class: ClassVar[Any]

    def __init__(self, config: Any):
        device = torch.get_default_device()
        with torch.device("meta"):
            super().__init__(config)  # pyright: ignore[reportCallIssue]
            # The family's own backbone would not know the initial values of the swapped layers.
            setattr(self, self.base_model_prefix, self.backbone_class(config, is_part_of_causal_lm=True))  # pyright: ignore
            swap_linears(self, config)  # pyright: ignore[reportArgumentType]
            self.post_init()  # pyright: ignore[reportAttributeAccessIssue]
        self._materialise(device)


def register_family(model_type: str) -> None:
    """Makes transformers' Auto classes know `lost_<model_type>`."""
    own_config: Any = CONFIG_MAPPING[model_type]
    own_backbone: Any = MODEL_MAPPING[own_config]
    own_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[own_config]

    class Config(WithParameterization, own_config):
        parameterization: dict | None = None

    Config.model_type = f"{PREFIX}{model_type}"

    class Backbone(LostBackbone, own_backbone):
        config_class = Config

    class Model(LostCausalLM, own_model):
        config_class = Config
        backbone_class = Backbone

    for ours, theirs in ((Config, own_config), (Backbone, own_backbone), (Model, own_model)):
        ours.__name__ = ours.__qualname__ = f"Lost{theirs.__name__}"
        # Where pickle looks for the class.
        globals()[ours.__name__] = ours
    AutoConfig.register(Config.model_type, Config, exist_ok=True)
    AutoModel.register(Config, Backbone, exist_ok=True)
    AutoModelForCausalLM.register(Config, Model, exist_ok=True)


def register_other_families() -> None:
    for model_type in OTHER_FAMILIES:
        register_family(model_type)
