"""Writes models as Hugging Face folders with a model card."""

from lost.export.card import CardFacts
from lost.export.folder import save_final, save_folder

__all__ = ["CardFacts", "save_final", "save_folder"]
