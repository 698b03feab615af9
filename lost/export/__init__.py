"""Writes models as Hugging Face folders with a model card."""

from lost.export.card import CardFacts, model_card
from lost.export.folder import save_final, save_folder

__all__ = ["CardFacts", "model_card", "save_final", "save_folder"]
