"""From the typed config to an initialised model: few dense weights at a time, the same bits for any split."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lost.accounting.costs import linear_costs
from lost.config.model import DenseConfig, ModelConfig, ParameterizationConfig
from lost.config.section import to_dict
from lost.model.families import LostLlamaConfig, LostLlamaForCausalLM
from lost.model.lost_init import FreshWeight, factorisation_cost, layer_generator
from lost.model.parameterizations import parameterization_of
from lost.model.split import Piece, Processes, own_tensors, shared_values, write
from lost.utils.errors import ConfigError


def build_model(
    model: ModelConfig,
    parameterization: ParameterizationConfig,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer_ids: Mapping[str, int | None] | None = None,
) -> PreTrainedModel:
    """A causal language model with initial weights: transformers' own LlamaForCausalLM if dense, else `lost_llama`.

    Args:
        model: the architecture.
        parameterization: form of the linear layers.
        seed: with a parameter's qualified name it gives the parameter's values, whatever else is in the model: the
            dense weights W0 of dense and of LOST are the same numbers.
        device: where the model ends; every weight is drawn and factorised on the CPU in float32 or better.
        dtype: of the parameters, rounded from float32 at the end.
        tokenizer_ids: bos_token_id, eos_token_id and pad_token_id, None for those that the tokenizer has not.

    Raises:
        ConfigError: a token id outside the vocabulary, or a parameterization that does not fit the architecture.
    """
    net = empty_model(model, parameterization, device=device, dtype=dtype, tokenizer_ids=tokenizer_ids)
    initialise(net, parameterization, seed)
    return net


def empty_model(
    model: ModelConfig,
    parameterization: ParameterizationConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer_ids: Mapping[str, int | None] | None = None,
) -> PreTrainedModel:
    """`build_model` without its values, for weights that a checkpoint brings: nothing is drawn or factorised.

    Parameters and persistent buffers hold whatever was in memory; the rotary embedding and the norms are set.
    """
    net = build_meta_model(model, parameterization, dtype=dtype, tokenizer_ids=tokenizer_ids)
    materialise(net, parameterization, device)
    return net


@torch.no_grad()
def materialise(net: PreTrainedModel, parameterization: ParameterizationConfig, device: torch.device | str) -> None:
    """Gives a model on the meta device, sharded by `fully_shard` or not, memory on `device`; `initialise` comes next.

    Parameters and persistent buffers hold whatever was in memory; the rotary embedding and the norms are set.
    """
    net.to_empty(device=device)
    net.tie_weights()
    for module in net.modules():
        if not _is_drawn(module, parameterization):
            net._init_weights(module)


def _is_drawn(module: nn.Module, parameterization: ParameterizationConfig) -> bool:
    """Whether initial values of the module are random numbers; norms and the rotary embedding draw none."""
    is_layer = parameterization_of(parameterization).is_layer(module)
    return is_layer or isinstance(module, nn.Linear | nn.Embedding)


def build_meta_model(
    model: ModelConfig,
    parameterization: ParameterizationConfig,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer_ids: Mapping[str, int | None] | None = None,
) -> PreTrainedModel:
    """The model on the meta device: shapes without memory.

    Raises:
        ConfigError: as `build_model`.
    """
    linear_costs(model, parameterization)
    config = llama_config(model, parameterization, tokenizer_ids)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            is_own = isinstance(config, LostLlamaConfig)
            net = LostLlamaForCausalLM(config) if is_own else LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    net.config.dtype = dtype
    return net


def llama_config(
    model: ModelConfig,
    parameterization: ParameterizationConfig,
    tokenizer_ids: Mapping[str, int | None] | None = None,
) -> LlamaConfig:
    """The config of transformers: LlamaConfig if dense, else LostLlamaConfig.

    Raises:
        ConfigError: a token id outside the vocabulary.
    """
    keys: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "initializer_range": model.initializer_range,
        "tie_word_embeddings": model.tie_word_embeddings,
        **token_ids(model, tokenizer_ids or {}),
    }
    if isinstance(parameterization, DenseConfig):
        return LlamaConfig(**keys)
    return LostLlamaConfig(parameterization=to_dict(parameterization), **keys)


def token_ids(model: ModelConfig, tokenizer_ids: Mapping[str, int | None]) -> dict[str, int | None]:
    """bos, eos and pad ids for the model's config.

    A pad that is also bos or eos is left out: the embedding of the pad token is zero and is never trained.
    """
    ids = {key: tokenizer_ids.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    problems = [
        f"{key} = {value}: must be from 0 to model.vocab_size - 1 = {model.vocab_size - 1};"
        " use the tokenizer that this vocabulary was sized for, or raise model.vocab_size"
        for key, value in ids.items()
        if value is not None and not 0 <= value < model.vocab_size
    ]
    if problems:
        raise ConfigError(problems)
    if ids["pad_token_id"] in (ids["bos_token_id"], ids["eos_token_id"]):
        ids["pad_token_id"] = None
    return ids


@torch.no_grad()
def initialise(
    net: PreTrainedModel,
    parameterization: ParameterizationConfig,
    seed: int,
    *,
    processes: Processes = Processes(),  # noqa: B008
) -> None:
    """Random initial values of a model that has been through `materialise`, the same bits for any split.

    Each module is computed whole by one of the processes and sent to the others, each of which writes what it keeps.
    A CPU thread holds one W0 at a time. Names of modules must be those of the plain model.

    Args:
        net: its parameters are plain tensors or DTensors.
        parameterization: the one that `net` was built with.
        seed: as in `build_model`.
        processes: those that call this together; by default this one works alone.

    Raises:
        LostError: a layer cannot be factorised as the config says; on every process.

    Numerics: N(0, initializer_range) in float32 on the CPU from (seed, name), norms 1, biases 0; the pad row of the
    embedding is 0, as transformers has it.
    """
    pieces = _pieces(net, parameterization, seed)
    for number, values in shared_values(pieces, processes):
        tensors = own_tensors(pieces[number].module)
        for name, value in values.items():
            write(tensors[name], value)


def _pieces(net: PreTrainedModel, parameterization: ParameterizationConfig, seed: int) -> list[Piece]:
    """Every module with random values; a tied head has those of the embedding."""
    form = parameterization_of(parameterization)
    std: float = net.config.initializer_range

    def layer_values(name: str, layer: Any) -> dict[str, torch.Tensor]:
        shape = (layer.out_features, layer.in_features)
        weight = FreshWeight(shape, std, layer_generator(seed, f"{name}.weight"))
        return form.initial_values(layer, weight, parameterization, layer_generator(seed, f"{name}.factors"))

    def dense_values(name: str, module: Any) -> dict[str, torch.Tensor]:
        weight = FreshWeight(tuple(module.weight.shape), std, layer_generator(seed, f"{name}.weight")).draw()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            weight[module.padding_idx].zero_()
        return {"weight": weight}

    pieces = []
    for name, module in net.named_modules():
        if not _is_drawn(module, parameterization) or _is_tied_head(net, module):
            continue
        compute = partial(layer_values if form.is_layer(module) else dense_values, name, module)
        pieces.append(Piece(module, _cost(module), compute, next(module.parameters()).device))
    return pieces


def _cost(module: nn.Module) -> int:
    """Relative work: that of a draw goes by the entries of the weight."""
    if isinstance(module, nn.Linear | nn.Embedding):
        return module.weight.numel()
    sizes: Any = module
    return factorisation_cost(sizes.out_features, sizes.in_features)


def _is_tied_head(net: PreTrainedModel, module: nn.Module) -> bool:
    return bool(net.config.tie_word_embeddings) and module is net.get_output_embeddings()
