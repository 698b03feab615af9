"""The LOST linear map: `lost_linear` is what modules call."""

from lost_kernels.lost_linear.reference import ACTIVATIONS, lost_linear

__all__ = ["ACTIVATIONS", "lost_linear"]
