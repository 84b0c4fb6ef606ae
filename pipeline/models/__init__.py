"""Build, adapt and safely load networks and pipelines."""
