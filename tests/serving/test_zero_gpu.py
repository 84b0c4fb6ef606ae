"""How long a request may hold ZeroGPU's device."""

import sys
from types import SimpleNamespace

import pytest

from pipeline.serving.endpoints import Endpoints
from pipeline.serving.requests import MAX_IMAGES, MAX_STEPS_PER_REQUEST
from pipeline.serving.session import DEADLINE, SWEEP_WS
from pipeline.serving.zero_gpu import START_SECONDS, STEP_SECONDS, duration_of, on_gpu

endpoints = Endpoints(None)


def create_seconds(steps, images=1, think=1):
    """Return the duration of a /create request."""
    arguments = ("", "", 1.0, steps, 1.0, images, 0, False, 0.0, 1.0, "network", 0, think)
    return duration_of(endpoints.create)(*arguments)


def test_duration_grows_with_the_steps_of_a_request():
    def expected(steps):
        return pytest.approx(START_SECONDS + STEP_SECONDS * steps)

    assert create_seconds(50) == expected(50)
    assert create_seconds(50, images=MAX_IMAGES) == expected(50 * MAX_IMAGES)
    assert create_seconds(20, think=6) == expected(120)
    assert create_seconds(MAX_STEPS_PER_REQUEST) <= DEADLINE
    sweep = duration_of(endpoints.sweep)("red heart", 0, 20, "network", 0)
    assert sweep == expected(20 * len(SWEEP_WS))
    assert duration_of(endpoints.forward)("red heart", 500, 0, True, None, 0) == expected(1)


@pytest.mark.parametrize("steps", [None, "50", 0, 10**9, float("nan"), [5]])
def test_duration_of_a_bad_request_is_short(steps):
    assert create_seconds(steps) == START_SECONDS


def test_on_gpu_decorates_in_a_space_only(monkeypatch):
    decorated = []

    def lend(duration):
        return lambda function: decorated.append(function) or decorated

    monkeypatch.setitem(sys.modules, "spaces", SimpleNamespace(GPU=lend))
    assert on_gpu(endpoints.create) == endpoints.create and not decorated
    monkeypatch.setenv("SPACE_ID", "tester/demo")
    assert on_gpu(endpoints.create) is decorated and decorated == [endpoints.create]
