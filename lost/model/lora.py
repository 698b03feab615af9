"""LoRA by peft, also beside LOST layers."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lost.config.finetune import LoraMethodConfig
from lost.model.adapter import adapter_targets
from lost.model.lost_linear import LostLinear
from lost.utils.errors import ConfigError, LostError

INSTALL = "method=lora needs the package peft: pip install 'lost-pretraining[finetune]'"


def require_peft() -> Any:
    """The package peft.

    Raises:
        LostError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise LostError(INSTALL) from error
    return peft


def add_lora(model: nn.Module, method: LoraMethodConfig, head: Sequence[str]) -> nn.Module:
    """The model with LoRA beside the chosen layers and everything else frozen, as peft wraps it.

    B is zero and A comes from torch's global generator.

    Args:
        head: modules that are trained whole and saved with the adapter.
    Raises:
        ConfigError: a pattern names no layer.
    """
    peft = require_peft()
    names = list(adapter_targets(model, method.target_modules))
    config = peft.LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=short_names(model, names),
        modules_to_save=list(head) or None,
    )
    register_lost(config)
    # In the dtype of the model: fully_shard takes no mixture.
    with quiet_peft():
        return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def short_names(model: nn.Module, names: list[str]) -> list[str]:
    """Last words of the names where those name nothing else, else the names."""
    words = sorted({name.rpartition(".")[2] for name in names})
    reached = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in words]
    return words if sorted(reached) == sorted(names) else names


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warnings of peft that it does not know LOST layers, which `register_lost` has told it, and that it
    asks transformers by an old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def register_lost(config: Any) -> None:
    """Tells a LoraConfig how to put LoRA beside a LOST layer."""
    config._register_custom_module({LostLinear: lora_beside_lost()})


def lora_beside_lost() -> type:
    from peft.tuners.lora import Linear

    class LoraBesideLost(Linear):
        """y = LOST(x) + (alpha / r) B A x."""

        def merge(self, *_: Any, **__: Any) -> None:
            raise ConfigError("LoRA beside a LOST layer cannot be merged into it: keep the adapter folder")

    return LoraBesideLost


def merge_lora(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """(the plain model with every LoRA added to its layer, names of LOST layers that keep theirs).

    With a LOST layer among them nothing is merged: the model comes back with its adapters in place.
    """
    assert isinstance(model, require_peft().PeftModel), model
    wrapped: Any = model
    plain: nn.Module = wrapped.base_model.model
    named = plain.named_modules()
    beside_lost = [name for name, module in named if isinstance(getattr(module, "base_layer", None), LostLinear)]
    return (plain, beside_lost) if beside_lost else (wrapped.merge_and_unload(), [])
