"""Operators of the LOST layer. They import torch (and triton where there is a GPU), nothing of `lost`."""
