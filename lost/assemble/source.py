"""What training starts from: fresh weights, or those of a model that is there already."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from lost.assemble.load import load_model
from lost.config.schema import DenseConfig, ModelConfig, ParameterizationConfig, PretrainConfig
from lost.config.section import build
from lost.model import LostLlamaConfig, build_model
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
    return Start(actual, loaded.tokenizer, lambda dtype, _: loaded.model.to(dtype))


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
    values = {key: getattr(hf, key) for key in keys}
    rope_theta = float((hf.rope_parameters or {}).get("rope_theta", 10000.0))  # pyright: ignore[reportAttributeAccessIssue]
    rank = hf.hidden_size // 4
    section = build(ModelConfig, {"name": "source", "rope_theta": rope_theta, "lineage_rank": rank, **values})
    if isinstance(hf, LostLlamaConfig):
        return section, build(ParameterizationConfig, hf.parameterization)
    return section, DenseConfig()
