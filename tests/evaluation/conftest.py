"""Fixtures of the evaluation's tests."""

import shutil

import pytest
from datasets_on_disk import load_images
from tiny_run import shapes_dataset, untrained_run

from pipeline.evaluation.feature_extractor import FeatureExtractor
from pipeline.evaluation.reference_set import ReferenceSet


@pytest.fixture(scope="session")
def feature_extractor():
    return FeatureExtractor()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The folder of a dataset of 28 coloured shapes."""
    return shapes_dataset(tmp_path_factory.mktemp("shapes") / "set")


@pytest.fixture
def references(feature_extractor, folder):
    cache = folder.parent / "cache"
    splits = [
        load_images(folder, split=split, resolution=16, cache_dir=cache)
        for split in ("train", "test")
    ]
    return ReferenceSet.from_splits(feature_extractor.features, splits)


@pytest.fixture(scope="session")
def untrained(folder):
    return untrained_run(folder.parent / "run", folder)


@pytest.fixture
def run(untrained, tmp_path):
    """The folder of a run that was never trained; its prepared data are shared."""
    return shutil.copytree(untrained, tmp_path, dirs_exist_ok=True)
