"""A validated generation request, stored in the PNG so that the image can be reproduced."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from pipeline.diffusion.guidance import InputError, Weight, interval

DENOISERS = ("network", "exact")
MAX_PROMPT_CHARACTERS = 500
MAX_IMAGES = 4
MAX_SEARCH_BUDGET = 16  # in samples
MAX_STEPS_PER_REQUEST = 1024  # images x steps
MAX_SEED = 2**53 - 1  # the largest integer that every JSON reader preserves


@dataclass(frozen=True)
class Request:
    """Everything that determines the images of one request, in the order the demo shows it.

    low, high: the noise levels between which guidance acts.
    think: the budget of a search for the best image, in samples; 1 is no search.
    """

    prompt: str = ""
    negative_prompt: str = ""
    w: float = 1.0
    steps: int = 50
    eta: float = 1.0
    images: int = 1
    seed: int = 0
    low: float = 0.0
    high: float = 1.0
    think: int = 1

    @classmethod
    def read(cls, raw: dict, T: int, rows: int | None = None) -> "Request":
        """Return the request in `raw`, values as they were sent; InputError lists all problems.

        T: the scheduler's number of timesteps. rows: the number of images, `images` by default.
        """
        ranges = {
            "w": (-10, 30),
            "steps": (1, T),
            "eta": (0, 1),
            "images": (1, MAX_IMAGES),
            "seed": (0, MAX_SEED),
            "low": (0, 1),
            "high": (0, 1),
            "think": (1, MAX_SEARCH_BUDGET),
        }
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        problems = []
        for name, value in raw.items():
            try:
                if name in ranges:
                    whole = isinstance(defaults[name], int)
                    values[name] = parse_number(name, value, *ranges[name], whole=whole)
                elif name in defaults:
                    values[name] = parse_text(name, value)
                else:
                    problems.append(f"{name} is not a setting. Use {', '.join(defaults)}.")
            except InputError as error:
                problems.append(str(error))
        if problems:
            raise InputError(" ".join(problems))
        request = cls(**values)
        request._check_combinations(rows or request.images)
        return request

    def _check_combinations(self, rows: int) -> None:
        """Raise InputError if values that are each in range do not fit together."""
        problems = []
        if self.low > self.high:
            interval_text = f"{self.low:g} to {self.high:g}"
            problems.append(f"The guidance interval {interval_text} is empty. Swap low and high.")
        if self.think > 1 and rows > 1:
            problems.append(
                f"A search returns one image, got think {self.think} and images {rows}. "
                "Set one of them to 1."
            )
        steps = rows * self.think * self.steps
        if steps > MAX_STEPS_PER_REQUEST:
            problems.append(
                f"One request may take {MAX_STEPS_PER_REQUEST} denoising steps in total, "
                f"got {steps}. Reduce steps, images or think."
            )
        if problems:
            raise InputError(" ".join(problems))

    @property
    def weight(self) -> Weight:
        """The guidance weight w as the pipeline takes it."""
        everywhere = (self.low, self.high) == (0, 1)
        return self.w if everywhere else interval(self.w, self.low, self.high)


def parse_number(name: str, value: Any, low: float, high: float, *, whole: bool = False) -> float:
    """Return a number in [low, high]; InputError for anything else, such as nan or True."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (whole and value % 1):
        kind = "a whole number" if whole else "a number"
        raise InputError(f"{name} must be {kind} from {low} to {high}, got {quoted(value)}.")
    return int(value) if whole else float(value)


def parse_integer(name: str, value: Any, low: int, high: int) -> int:
    """Return a whole number in [low, high], which may arrive as a float; InputError otherwise."""
    return int(parse_number(name, value, low, high, whole=True))


def parse_text(name: str, value: Any) -> str:
    """Return a text; InputError if it is too long, not a string or not valid Unicode."""
    if not isinstance(value, str):
        raise InputError(f"{name} must be a text, got {quoted(value)}.")
    if len(value) > MAX_PROMPT_CHARACTERS:
        raise InputError(
            f"{name} may have {MAX_PROMPT_CHARACTERS} characters, got {len(value)}. Shorten it."
        )
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InputError(f"{name} contains half a surrogate pair. Send valid Unicode.")
    return value


def quoted(value: Any) -> str:
    """Return a short repr of a value for a message."""
    return f"{value!r:.40}"
