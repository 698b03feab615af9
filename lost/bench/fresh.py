"""A model with fresh weights and its batch, for the benchmarks that train one."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lost.config.schema import BenchConfig
from lost.model.build import build_meta_model, initialise, materialise
from lost.train.engine import Fill
from lost.train.runtime import Runtime


def meta_model_and_fill(config: BenchConfig, runtime: Runtime) -> tuple[PreTrainedModel, Fill]:
    """What an engine takes: the LOST model on the meta device, and the function that gives it its weights."""
    model = build_meta_model(config.model, config.parameterization, dtype=runtime.param_dtype)

    def fill(net: nn.Module) -> None:
        assert net is model
        materialise(model, config.parameterization, runtime.device)
        initialise(model, config.parameterization, seed=0)

    return model, fill


def random_ids(config: BenchConfig, device: torch.device) -> Tensor:
    """The tokens of one training step, the same in every call, [rows, seq_len]."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_rows_of(config), config.seq_len)
    return torch.randint(config.model.vocab_size, shape, generator=generator).to(device)


def num_rows_of(config: BenchConfig) -> int:
    """Rows of one training step."""
    return max(1, config.num_tokens // config.seq_len)
