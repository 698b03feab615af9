"""Dense checkpoints of transformers to LOST form, by the SVD of the trained weights, layer by layer."""

from lost.convert.conversion import Conversion, convert

__all__ = ["Conversion", "convert"]
