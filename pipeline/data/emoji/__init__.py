"""The embedded emoji datasets."""
