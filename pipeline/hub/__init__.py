"""Publish models: push runs, export and pull folders, make Spaces."""

import importlib
import warnings

# Names that `from pipeline import hub` had in version 0.1, with their new places. They go in the
# next release. `hub.push` and `hub.space` are missing: these names are submodules now.
_RENAMED = {
    "load": ("pipeline.models.loading", "load_pipeline"),
    "newest": ("pipeline.models.locate", "default_model"),
    "pull": ("pipeline.hub.export", "pull"),
    "ship": ("pipeline.hub.export", "export"),
}


def __getattr__(name: str) -> object:
    """Return a public function by its old name, with a DeprecationWarning."""
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, function = _RENAMED[name]
    warnings.warn(
        f"pipeline.hub.{name} is deprecated; use {module}.{function}",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(importlib.import_module(module), function)
