"""LOST: low-rank and sparse pre-training of LLaMA-family language models (arXiv 2508.02668).

`import lost` is cheap: torch and transformers load when a name is first touched.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lost.config.model import LostConfig
    from lost.model import LostLinear, LostLlamaConfig, LostLlamaForCausalLM, inject

_HOMES = {
    "LostConfig": "lost.config.model",
    "LostLinear": "lost.model",
    "LostLlamaConfig": "lost.model",
    "LostLlamaForCausalLM": "lost.model",
    "inject": "lost.model",
}
__all__ = ["LostConfig", "LostLinear", "LostLlamaConfig", "LostLlamaForCausalLM", "__version__", "inject"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'lost' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
