"""Run the demo's drawing events on the GPU that ZeroGPU lends a Space for one request."""

import importlib
import inspect
import math
import os
from collections.abc import Callable
from typing import Any

from pipeline.diffusion.guidance import InputError
from pipeline.serving.requests import MAX_STEPS_PER_REQUEST, parse_integer
from pipeline.serving.session import DEADLINE, SWEEP_WS

# Estimates, in seconds: of moving a model to the GPU, and of one guided denoising step.
START_SECONDS = 10
STEP_SECONDS = 0.1
IMAGES = {"sweep": len(SWEEP_WS)}  # of endpoints that do not let the visitor choose


def on_gpu(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Return an endpoint that asks a Space for its GPU; outside a Space, the endpoint itself.

    endpoint: a bound method, because ZeroGPU pickles the arguments for the process it forks.
    """
    if "SPACE_ID" not in os.environ:
        return endpoint
    spaces = importlib.import_module("spaces")
    return spaces.GPU(duration=duration_of(endpoint))(endpoint)


def duration_of(endpoint: Callable[..., Any]) -> Callable[..., float]:
    """Return the function that estimates the seconds of a request from an endpoint's arguments."""
    signature = inspect.signature(endpoint)
    images = IMAGES.get(endpoint.__name__, 1)

    def duration(*args: Any, **kwargs: Any) -> float:
        given = signature.bind(*args, **kwargs).arguments
        counts = {name: given[name] for name in ("steps", "images", "think") if name in given}
        try:
            read = [parse_integer(name, n, 1, MAX_STEPS_PER_REQUEST) for name, n in counts.items()]
        except InputError:
            return START_SECONDS  # the endpoint refuses the request at once
        return min(START_SECONDS + STEP_SECONDS * images * math.prod(read), DEADLINE)

    return duration
