"""Writes models as Hugging Face folders with a model card."""

from lost.export.card import CardFacts, Form, adapted_card, model_card
from lost.export.folder import save_final, save_folder
from lost.export.forms import CLASSIFIER, auto_class, code_of, dense_model, lost_layers

__all__ = [
    "CLASSIFIER",
    "CardFacts",
    "Form",
    "adapted_card",
    "auto_class",
    "code_of",
    "dense_model",
    "lost_layers",
    "model_card",
    "save_final",
    "save_folder",
]
