"""Captioned images in, tensors out."""
