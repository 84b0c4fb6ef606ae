"""Fixtures of the models' tests."""

import pytest

from pipeline.evaluation.feature_extractor import FeatureExtractor


@pytest.fixture(scope="session")
def feature_extractor():
    return FeatureExtractor()
