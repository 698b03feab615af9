"""The LOST layer, what puts it into a module, and the model types that transformers knows after this import."""

from lost.model.build import build_model, empty_model
from lost.model.families import LostLlamaConfig, LostLlamaForCausalLM, LostLlamaModel, register
from lost.model.inject import InjectionReport, inject
from lost.model.lost_linear import LostLinear
from lost.model.other_families import register_other_families
from lost.model.sequence_classification import register_classifiers

register()
register_other_families()
register_classifiers()

__all__ = [
    "InjectionReport",
    "LostLinear",
    "LostLlamaConfig",
    "LostLlamaForCausalLM",
    "LostLlamaModel",
    "build_model",
    "empty_model",
    "inject",
]
