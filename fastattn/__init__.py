"""Attention, normalisation, feed-forward and loss kernels in Triton for PyTorch."""

__version__ = "0.1.0"
