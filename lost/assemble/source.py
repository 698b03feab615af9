"""What training starts from: fresh weights, or those of a model that is there already."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from lost.assemble.load import load_model
from lost.config.schema import DenseConfig, ModelConfig, ParameterizationConfig, PretrainConfig
from lost.config.section import build
from lost.model import LostLlamaConfig, build_model
from lost.model.build import llama_config
from lost.utils.errors import ConfigError


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        config: the run's config, its model and parameterization those of the source where there is one.
        tokenizer: the source's; None: the data section decides.
        make_model: (dtype, tokenizer of the data) -> the weights of step 0, on the CPU.
    """

    config: PretrainConfig
    tokenizer: PreTrainedTokenizerBase | None
    make_model: Callable[[torch.dtype, PreTrainedTokenizerBase], PreTrainedModel]


def start_of(config: PretrainConfig) -> Start:
    """Fresh weights from config.model, or the model that config.source names.

    Raises:
        ConfigError: the source is no LLaMA, or shorter than train.seq_len.
        LostError: the source cannot be read.
    """
    if not config.source:

        def fresh(dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
            ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
            return build_model(config.model, config.parameterization, seed=config.seed, dtype=dtype, tokenizer_ids=ids)

        return Start(config, None, fresh)

    loaded = load_model(config.source, device="cpu", dtype=torch.float32)
    model, parameterization = sections_of(loaded.model, config.source)
    if config.train.seq_len > model.max_position_embeddings:
        raise ConfigError(
            f"train.seq_len = {config.train.seq_len} is above max_position_embeddings = {model.max_position_embeddings}"
            f" of {config.source}: choose a shorter row"
        )
    actual = dataclasses.replace(config, model=model, parameterization=parameterization)

    def continued(dtype: torch.dtype, _: PreTrainedTokenizerBase) -> PreTrainedModel:
        # Loaded anew, because Module.to() would round the rotary frequencies and a learnable gamma to bf16 as well.
        return loaded.model if dtype == torch.float32 else load_model(config.source, dtype=dtype).model

    return Start(actual, loaded.tokenizer, continued)


def sections_of(model: PreTrainedModel, origin: str) -> tuple[ModelConfig, ParameterizationConfig]:
    """The config sections that describe a loaded LLaMA.

    Raises:
        ConfigError: another architecture.
    """
    hf = model.config
    if not isinstance(hf, LlamaConfig):
        raise ConfigError(
            f"source = {origin} is a {hf.model_type} model: `lost pretrain` goes on from LLaMA and LOST LLaMA models"
        )
    keys = {field.name for field in dataclasses.fields(ModelConfig)} - {"name", "lineage_rank", "rope_theta"}
    values: dict[str, Any] = {key: getattr(hf, key) for key in keys}
    rope: dict[str, Any] = dict(getattr(hf, "rope_parameters", None) or {})
    values |= {"name": "source", "rope_theta": float(rope.get("rope_theta", 10000.0))}
    section = build(ModelConfig, values | {"lineage_rank": hf.hidden_size // 4})
    is_lost = isinstance(hf, LostLlamaConfig)
    parameterization = hf.typed_parameterization if is_lost else DenseConfig()
    refuse_other_architecture(hf, llama_config(section, parameterization), origin)
    return section, parameterization


def refuse_other_architecture(hf: LlamaConfig, ours: LlamaConfig, origin: str) -> None:
    """Raises where the config sections cannot say what the model is: its checkpoints would load as another model.

    Raises:
        ConfigError: lists every key that differs.
    """
    keys = ("hidden_act", "attention_bias", "mlp_bias", "head_dim", "rope_parameters", "attention_dropout")
    problems = [
        f"source = {origin} has {key} = {getattr(hf, key)}: `lost pretrain` can only go on with {getattr(ours, key)}"
        for key in keys
        if getattr(hf, key) != getattr(ours, key)
    ]
    if problems:
        raise ConfigError(problems)
