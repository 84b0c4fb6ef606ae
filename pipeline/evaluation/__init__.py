"""How good a model's samples are."""
