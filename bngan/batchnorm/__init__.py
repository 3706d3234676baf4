"""Batch normalization: the layers, which statistics normalize, and what they do to a GAN."""
