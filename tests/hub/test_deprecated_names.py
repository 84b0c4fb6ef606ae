"""The public names of version 0.1 work for one more release, with a warning."""

import pytest

from pipeline import hub
from pipeline.hub.export import export, pull
from pipeline.models.loading import load_pipeline
from pipeline.models.locate import default_model

MOVED = {"load": load_pipeline, "newest": default_model, "pull": pull, "ship": export}


@pytest.mark.parametrize("name", MOVED)
def test_getattr_returns_the_new_function_and_warns(name):
    with pytest.warns(DeprecationWarning, match=f"pipeline.hub.{name} .*{MOVED[name].__name__}"):
        assert getattr(hub, name) is MOVED[name]


def test_getattr_knows_nothing_else():
    with pytest.raises(AttributeError, match="patiently"):
        hub.patiently  # noqa: B018
