"""What training starts from: fresh weights, or those of a model that is there already."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from lost.assemble.load import load_model, special_ids
from lost.config.model import DenseConfig, ModelConfig, ParameterizationConfig
from lost.config.schema import PretrainConfig
from lost.config.section import build
from lost.model import LostLlamaConfig
from lost.model.build import build_meta_model, initialise, llama_config
from lost.model.split import Processes, write
from lost.utils.errors import ConfigError

FillModel = Callable[[PreTrainedModel, Processes], None]


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        config: the run's config, its model and parameterization those of the source where there is one.
        tokenizer: the source's; None: the data section decides.
        fill: (model, processes) -> None: gives a model the weights of step 0, together with the other processes.
    """

    config: PretrainConfig
    tokenizer: PreTrainedTokenizerBase | None
    fill: FillModel

    def make_meta_model(self, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """The model without memory, to be wrapped first and filled then."""
        config = self.config
        ids = special_ids(tokenizer)
        return build_meta_model(config.model, config.parameterization, dtype=dtype, tokenizer_ids=ids)


def start_of(config: PretrainConfig) -> Start:
    """Fresh weights from config.model, or the model that config.source names.

    Raises:
        ConfigError: the source is no LLaMA, or shorter than train.seq_len.
        LostError: the source cannot be read.
    """
    if not config.source:

        def fresh(net: PreTrainedModel, processes: Processes) -> None:
            initialise(net, config.parameterization, config.seed, processes=processes)

        return Start(config, None, fresh)

    loaded = load_model(config.source, device="cpu", dtype=torch.float32)
    model, parameterization = sections_of(loaded.model, config.source)
    if config.train.seq_len > model.max_position_embeddings:
        raise ConfigError(
            f"train.seq_len = {config.train.seq_len} is above max_position_embeddings = {model.max_position_embeddings}"
            f" of {config.source}: choose a shorter row"
        )
    actual = dataclasses.replace(config, model=model, parameterization=parameterization)

    def continued(net: PreTrainedModel, _: Processes) -> None:
        # Loaded anew, so that no second copy lives on.
        weights = load_model(config.source, dtype=net.dtype).model.state_dict()
        for name, tensor in net.state_dict().items():
            write(tensor, weights[name])

    return Start(actual, loaded.tokenizer, continued)


def start_as_stored(config: PretrainConfig, stored: dict[str, Any], run_dir: Path) -> Start:
    """The start of a run that began from a source and goes on: all is in run_dir, the source may be gone.

    Args:
        stored: the settings in run_dir, whose model and parameterization are the source's.
    """
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "tokenizer", local_files_only=True)
    model, parameterization = (
        build(ModelConfig, stored["model"]),
        build(ParameterizationConfig, stored["parameterization"]),
    )

    def no_fresh_weights(*_: object) -> None:
        raise AssertionError("a stored run has a checkpoint")

    return Start(
        dataclasses.replace(config, model=model, parameterization=parameterization), tokenizer, no_fresh_weights
    )


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
