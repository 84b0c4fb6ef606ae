"""What the serving tests share: the colours of their images, and the last frame of a request."""

from pipeline.serving.requests import Request

COLOURS = {
    "red heart": (250, 20, 20),
    "green heart": (20, 250, 20),
    "blue circle": (20, 20, 250),
    "yellow square": (250, 250, 20),
}
# 240 calls: four candidates of 40, each scored by 18.
SEARCH = Request("red heart", w=1.0, steps=20, seed=7, think=6)


def last(frames):
    """Return the last of a request's frames, which has its images."""
    *_, frame = frames
    assert frame.last
    return frame
