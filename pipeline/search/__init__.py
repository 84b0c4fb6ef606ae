"""Inference-time compute."""
