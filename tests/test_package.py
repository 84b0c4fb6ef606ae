"""The names that `pipeline` exports, and those that moved."""

import importlib

import pytest

import pipeline


@pytest.mark.parametrize("name", pipeline.__all__)
def test_public_names_are_imported_on_first_use(name):
    module = importlib.import_module(f"pipeline.{pipeline._MODULES[name]}")
    assert getattr(pipeline, name) is getattr(module, name)
    assert name in dir(pipeline)
    assert pipeline.__all__ == list(pipeline._MODULES)


@pytest.mark.parametrize("name", pipeline._MOVED)
def test_moved_modules_keep_an_alias_with_a_warning(name):
    with pytest.warns(DeprecationWarning, match=pipeline._MOVED[name]):
        module = pipeline.__getattr__(name)
    assert module.__name__ == f"pipeline.{pipeline._MOVED[name]}"


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="nothing_here"):
        pipeline.nothing_here  # noqa: B018
