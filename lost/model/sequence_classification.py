"""Text classifiers on the backbones of `lost_llama` and its relatives: one linear layer on the last token."""

from typing import Any

from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from lost.model.families import WithLostLayers

PREFIX = "Lost"


def register_classifier(config_class: Any) -> None:
    """Makes AutoModelForSequenceClassification know the LOST family of this config."""
    backbone: Any = MODEL_MAPPING[config_class]
    own_base = next(base for base in backbone.__mro__ if is_family_base(base))

    class Classifier(GenericForSequenceClassification, WithLostLayers, own_base):
        base_model_prefix = own_base.base_model_prefix

    Classifier.config_class = config_class
    family = backbone.__name__.removesuffix("Model")
    Classifier.__name__ = Classifier.__qualname__ = f"{family}ForSequenceClassification"
    # Where pickle looks for the class.
    globals()[Classifier.__name__] = Classifier
    AutoModelForSequenceClassification.register(config_class, Classifier, exist_ok=True)


def is_family_base(base: type) -> bool:
    """Whether a class is the family's own <Family>PreTrainedModel."""
    is_of_transformers = issubclass(base, PreTrainedModel) and not issubclass(base, WithLostLayers)
    return is_of_transformers and base.__name__.endswith("PreTrainedModel") and base is not PreTrainedModel


def register_classifiers() -> None:
    """All families whose backbone AutoModel builds by a class of ours."""
    for config_class, backbone in MODEL_MAPPING._extra_content.items():
        if isinstance(backbone, type) and issubclass(backbone, WithLostLayers):
            register_classifier(config_class)
