"""Deliberate mistakes in the data modules, each with the test that notices it."""

import inspect

import pytest
import test_dataset
import test_image_ops
import test_latent_cache
import test_sampler
import test_streaming

from pipeline.data import image_ops, sampler
from pipeline.data.dataset import CaptionedImages
from pipeline.data.latent_cache import LatentCache
from pipeline.data.streaming import Stream

REAL_ORDER = sampler.epoch_order
REAL_SAMPLE = LatentCache.sample
REAL_LENGTHS = CaptionedImages.with_caption_lengths
REAL_STATE = Stream.state_dict


def ignore_flips(self, rows, mirrored, z):
    return REAL_SAMPLE(self, rows, mirrored & False, z)


def repeat_one_order(seed, epoch, n):
    return REAL_ORDER(seed, 0, n)


def always_crop_the_centre(content):
    return 0.5


def count_no_cut_captions(self, tokenizer, length):
    return REAL_LENGTHS(self, tokenizer, 10**6)


def skip_an_example(self):
    state = REAL_STATE(self)
    return state | {"position": state["position"] + 1}


BREAKS = {
    "flip ignored": (
        (LatentCache, "sample", ignore_flips),
        test_latent_cache.test_sample_is_the_posterior_of_the_image_or_its_mirror,
        {},
    ),
    "one order for all epochs": (
        (sampler, "epoch_order", repeat_one_order),
        test_sampler.test_epoch_order_depends_on_epoch_and_seed,
        {},
    ),
    "constant crop offset": (
        (image_ops, "crop_offset", always_crop_the_centre),
        test_image_ops.test_crop_offset_is_random_but_fixed_per_image,
        {},
    ),
    "cut captions not counted": (
        (CaptionedImages, "with_caption_lengths", count_no_cut_captions),
        test_dataset.test_with_caption_lengths_counts_tokens_and_cut_captions,
        {},
    ),
    "stream position off by one": (
        (Stream, "state_dict", skip_an_example),
        test_streaming.test_load_state_dict_resumes_at_the_saved_example,
        {"taken": 3, "process": 0, "processes": 1},
    ),
}


@pytest.mark.parametrize(("mistake", "check", "arguments"), BREAKS.values(), ids=BREAKS)
def test_semantic_breaks_are_noticed(mistake, check, arguments, request, monkeypatch):
    needed = inspect.signature(check).parameters.keys() - arguments.keys()
    fixtures = {name: request.getfixturevalue(name) for name in needed}
    monkeypatch.setattr(*mistake)
    with pytest.raises(AssertionError):
        check(**fixtures, **arguments)
