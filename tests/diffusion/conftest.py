"""Fixtures that several files of this folder share."""

import pytest
from tiny import tiny_pipeline


@pytest.fixture
def pipe():
    return tiny_pipeline()
