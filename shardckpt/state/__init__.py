"""Torch objects to named tensors and values, and back. Imports `format` and below."""
