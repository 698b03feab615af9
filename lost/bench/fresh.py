"""A model with fresh weights, for the benchmarks that train one."""

from torch import nn
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
