"""Model types of transformers whose linear layers have another form: `lost_llama`.

Built on the meta device, swapped there, and only then given memory, so that the dense weights never exist together.
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from lost.config.model import ParameterizationConfig
from lost.config.section import build, to_dict
from lost.model.blocks import LostLlamaAttention, LostLlamaMLP, LostLlamaRMSNorm
from lost.model.lost_init import FreshWeight
from lost.model.parameterizations import parameterization_of
from lost.model.split import write
from lost.utils.errors import CheckpointError


class WithParameterization:
    """What a family's config has besides its own keys: `parameterization`, checked and whole."""

    # The families' plans shard nn.Linear by columns and rows; the swapped layers have other parameters.
    base_model_tp_plan = {}  # noqa: RUF012
    parameterization: dict | None

    def __post_init__(self, **kwargs: Any) -> None:
        given = {"name": "lost"} if self.parameterization is None else self.parameterization
        # All keys are stored, so that a later default does not change a saved model.
        self.parameterization = to_dict(build(ParameterizationConfig, given))
        super().__post_init__(**kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def typed_parameterization(self) -> ParameterizationConfig:
        return build(ParameterizationConfig, self.parameterization or {})

    def to_diff_dict(self) -> dict[str, Any]:
        own: dict[str, Any] = super().to_diff_dict()  # pyright: ignore[reportAttributeAccessIssue]
        return own | {"parameterization": self.parameterization}


class LostLlamaConfig(WithParameterization, LlamaConfig):
    """LlamaConfig plus `parameterization`: the section of that name as plain JSON, LOST's defaults if not given.

    Raises:
        ConfigError: `parameterization` has an unknown key, a wrong type or a broken rule.
    """

    model_type = "lost_llama"

    parameterization: dict | None = None


class WithLostLayers:
    """Initial values of the swapped layers; transformers asks the backbone and the language model for them alike."""

    config: Any
    _tp_plan = {}  # noqa: RUF012
    # A learnable gamma in bfloat16 moves in steps of 0.4 %.
    _keep_in_fp32_modules_strict = ["gamma"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        config = self.config.typed_parameterization
        form = parameterization_of(config)
        if not form.is_layer(module):
            super()._init_weights(module)  # pyright: ignore[reportAttributeAccessIssue]
        elif not _is_loaded(module):
            # The aliases of torch.nn.init skip loaded weights; this draw is a fresh tensor.
            weight = FreshWeight((module.out_features, module.in_features), self.config.initializer_range)  # pyright: ignore
            for name, value in form.initial_values(module, weight, config, None).items():
                write(getattr(module, name), value)

    def _materialise(self, device: torch.device) -> None:
        """Memory and initial values, unless an outer context builds on the meta device."""
        if device.type != "meta":
            self.to_empty(device=device)  # pyright: ignore[reportAttributeAccessIssue]
            self.init_weights()  # pyright: ignore[reportAttributeAccessIssue]


class LostLlamaPreTrainedModel(WithLostLayers, LlamaPreTrainedModel):
    config: LostLlamaConfig
    config_class = LostLlamaConfig


class LostLlamaModel(LostLlamaPreTrainedModel, LlamaModel):
    """LLaMA's backbone with its linear layers in the form that `config.parameterization` says.

    Args:
        config: the architecture.
        is_part_of_causal_lm: leave the linear layers to the language model that owns this backbone.
    """

    def __init__(self, config: LostLlamaConfig, *, is_part_of_causal_lm: bool = False):
        device = torch.get_default_device()
        with torch.device("meta"):
            super().__init__(config)
            for index, block in enumerate(self.layers):
                block.self_attn, block.mlp = LostLlamaAttention(config, index), LostLlamaMLP(config)
                block.input_layernorm, block.post_attention_layernorm = _norm(config), _norm(config)
            self.norm = _norm(config)
            if not is_part_of_causal_lm:
                swap_linears(Shell(self), config)
        self._materialise(device)


def _norm(config: LostLlamaConfig) -> LostLlamaRMSNorm:
    return LostLlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class LostLlamaForCausalLM(LostLlamaPreTrainedModel, LlamaForCausalLM):
    """LLaMA's causal language model with its linear layers in the form that `config.parameterization` says.

    Built directly it holds usable weights from torch's global generator; `lost.model.build_model` draws them by seed.

    Raises:
        ConfigError: a pattern of the parameterization matches no layer.
        ShapeError: a rank is above a layer's width.
    """

    def __init__(self, config: LostLlamaConfig):
        device = torch.get_default_device()
        with torch.device("meta"):
            # Not LlamaForCausalLM's: it would build transformers' own backbone.
            super(LlamaForCausalLM, self).__init__(config)
            self.model = LostLlamaModel(config, is_part_of_causal_lm=True)
            self.vocab_size = config.vocab_size
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            swap_linears(self, config)
            self.post_init()
        self._materialise(device)


def swap_linears(module: nn.Module, config: Any) -> None:
    """Replaces the linears that `config.parameterization` names; `module` is on the meta device."""
    parameterization = config.typed_parameterization
    parameterization_of(parameterization).swap(module, parameterization)


class Shell(nn.Module):
    """Around a lone backbone, so that its layers have the names which the patterns of its config know."""

    def __init__(self, backbone: PreTrainedModel):
        super().__init__()
        self.add_module(backbone.base_model_prefix, backbone)
        self.config: Any = backbone.config
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)


def _is_loaded(layer: nn.Module) -> bool:
    """Whether from_pretrained has filled every tensor of a swapped layer.

    Raises:
        CheckpointError: it has filled only some of them; factors without their kept channels mean nothing.
    """
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    loaded = {name for name, tensor in tensors.items() if getattr(tensor, "_is_hf_initialized", False)}
    if loaded and loaded != set(tensors):
        missing = ", ".join(sorted(set(tensors) - loaded))
        raise CheckpointError(
            f"a {type(layer).__name__} lacks {missing} in the checkpoint, or has another shape there: it is not"
            " complete, or its config.json is another model's"
        )
    return bool(loaded)


def register() -> None:
    """Makes transformers' Auto classes know the model types of this file."""
    AutoConfig.register(LostLlamaConfig.model_type, LostLlamaConfig, exist_ok=True)
    AutoModel.register(LostLlamaConfig, LostLlamaModel, exist_ok=True)
    AutoModelForCausalLM.register(LostLlamaConfig, LostLlamaForCausalLM, exist_ok=True)
