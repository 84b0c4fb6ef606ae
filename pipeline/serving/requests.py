"""What is asked of the page or a command line for one picture: checked, and carried by the PNG, so that it is drawn again."""

import dataclasses
from dataclasses import dataclass
from numbers import Real

from pipeline.diffusion.guidance import InputError, Weight, interval

DENOISERS = ("network", "exact")
MAX_PROMPT_CHARACTERS = 500  # of a prompt
MAX_IMAGES = 4
MAX_SEARCH_BUDGET = 16  # samples' worth of network calls that one picture may take
MAX_STEPS_PER_REQUEST = 1024  # pictures x steps of one request
MAX_SEED = 2**53 - 1  # the largest whole number that every reader of JSON keeps


@dataclass(frozen=True)
class Request:
    """What one click asks for; `low` and `high` are the noise levels between which guidance acts.

    think: how many samples' network calls a search spends on the one picture; 1 is none.
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
        """The request in `raw`, values as they came; InputError names all that is wrong with them.

        T is the scheduler's number of timesteps, `rows` how many pictures it draws where that is not `images`.
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
        known, found, problems = {f.name: f.default for f in dataclasses.fields(cls)}, {}, []
        for name, value in raw.items():
            if name not in known:
                problems.append(f"{name} is not a setting, expected {', '.join(known)}")
            elif name in ranges:
                found[name] = parse_number(
                    name, value, *ranges[name], isinstance(known[name], int), problems
                )
            else:
                found[name] = parse_text(name, value, problems)
        if not problems:
            request = cls(**found)
            problems = request.problems(rows or request.images)
        if problems:
            raise InputError("; ".join(problems))
        return request

    def problems(self, rows: int) -> list[str]:
        """What is wrong with settings that are each in range."""
        found = []
        if self.low > self.high:
            found.append(
                f"the guidance interval is {self.low:g} to {self.high:g}, expected its start below its end: swap them"
            )
        if self.think > 1 and rows > 1:
            found.append(
                f"images is {rows} and think is {self.think}, expected 1 of either: a search ends in one picture"
            )
        if (spent := rows * self.think * self.steps) > MAX_STEPS_PER_REQUEST:
            what = (
                f"{rows} pictures of {self.steps} steps"
                if self.think == 1
                else f"{self.think} times {self.steps} steps"
            )
            found.append(
                f"{what} are {spent} network steps, and one request may take {MAX_STEPS_PER_REQUEST}: ask for fewer of either"
            )
        return found

    @property
    def weight(self) -> Weight:
        """w as the pipeline takes it."""
        return self.w if (self.low, self.high) == (0, 1) else interval(self.w, self.low, self.high)


def parse_number(
    name: str, value, low: float, high: float, whole: bool, problems: list[str]
) -> float | int | None:
    """A number in [low, high]; anything else is one more of `problems`."""
    kind = "a whole number" if whole else "a number"
    good = (
        isinstance(value, Real) and not isinstance(value, bool) and low <= value <= high
    )  # nan is not
    if not good or (whole and value != int(value)):
        problems.append(f"{name} is {quoted(value)}, expected {kind} from {low} to {high}")
        return None
    return int(value) if whole else float(value)


def parse_text(name: str, value, problems: list[str]) -> str | None:
    """A text that is not too long and can be encoded; anything else is one more of `problems`."""
    if not isinstance(value, str):
        problems.append(f"{name} is {quoted(value)}, expected a text")
    elif len(value) > MAX_PROMPT_CHARACTERS:
        problems.append(
            f"{name} has {len(value)} characters, expected {MAX_PROMPT_CHARACTERS} at most: shorten it"
        )
    elif any("\ud800" <= letter <= "\udfff" for letter in value):
        problems.append(f"{name} holds half a surrogate pair, expected Unicode text")
    else:
        return value
    return None


def quoted(value) -> str:
    """A value as a message may quote it."""
    return f"{value!r:.40}"
