"""Tensors and integers in, tensors out: one operation a file, each with a plain-torch twin."""
