"""What is asked of the page or a command line for one picture: checked, and carried by the PNG, so that it is drawn again."""

import dataclasses
import io
import json
import re
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import PIL.Image

from pipeline.diffusion.guidance import InputError, Weight, interval

DENOISERS = ("network", "exact")
CHARACTERS = 500  # of a prompt
IMAGES = 4
THINK = 16  # samples' worth of network calls that one picture may take
BUDGET = 1024  # pictures x steps of one request
SEEDS = 2**53 - 1  # the largest whole number that every reader of JSON keeps
UPLOAD, UPLOAD_PIXELS = 2_000_000, 4_000_000  # bytes and pixels of a file


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
            "images": (1, IMAGES),
            "seed": (0, SEEDS),
            "low": (0, 1),
            "high": (0, 1),
            "think": (1, THINK),
        }
        known, found, problems = {f.name: f.default for f in dataclasses.fields(cls)}, {}, []
        for name, value in raw.items():
            if name not in known:
                problems.append(f"{name} is not a setting, expected {', '.join(known)}")
            elif name in ranges:
                found[name] = number(
                    name, value, *ranges[name], isinstance(known[name], int), problems
                )
            else:
                found[name] = text(name, value, problems)
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
        if (spent := rows * self.think * self.steps) > BUDGET:
            what = (
                f"{rows} pictures of {self.steps} steps"
                if self.think == 1
                else f"{self.think} times {self.steps} steps"
            )
            found.append(
                f"{what} are {spent} network steps, and one request may take {BUDGET}: ask for fewer of either"
            )
        return found

    @property
    def weight(self) -> Weight:
        """w as the pipeline takes it."""
        return self.w if (self.low, self.high) == (0, 1) else interval(self.w, self.low, self.high)


def number(
    name: str, value, low: float, high: float, whole: bool, problems: list[str]
) -> float | int | None:
    """A number in [low, high]; anything else is one more of `problems`."""
    kind = "a whole number" if whole else "a number"
    good = (
        isinstance(value, Real) and not isinstance(value, bool) and low <= value <= high
    )  # nan is not
    if not good or (whole and value != int(value)):
        problems.append(f"{name} is {shown(value)}, expected {kind} from {low} to {high}")
        return None
    return int(value) if whole else float(value)


def text(name: str, value, problems: list[str]) -> str | None:
    """A text that is not too long and can be encoded; anything else is one more of `problems`."""
    if not isinstance(value, str):
        problems.append(f"{name} is {shown(value)}, expected a text")
    elif len(value) > CHARACTERS:
        problems.append(
            f"{name} has {len(value)} characters, expected {CHARACTERS} at most: shorten it"
        )
    elif any("\ud800" <= letter <= "\udfff" for letter in value):
        problems.append(f"{name} holds half a surrogate pair, expected Unicode text")
    else:
        return value
    return None


def shown(value) -> str:
    """A value as a message may quote it."""
    return f"{value!r:.40}"


# ---- what a PNG carries


def identity(name: str, digest: str) -> str:
    """A model's name with digits of its weights: what draws a picture again."""
    return f"{name} ({digest[:8]})"


def same_model(one: str, other: str) -> bool:
    """Whether two identities are of the same weights, whatever the folders are called; without digits, of one name."""
    digits = [
        found and found[1] for found in (re.search(r" \((\w{8})\)$", text) for text in (one, other))
    ]
    return digits[0] == digits[1] if all(digits) else one == other


def signature(request: Request, denoiser: str, model: str, image: int = 0) -> dict:
    """What a PNG carries as `parameters`, in JSON: the request, who drew it, and which of its images this is."""
    return dataclasses.asdict(request) | {"image": image, "denoiser": denoiser, "model": model}


def opened(path: str | Path, kinds: tuple[str, ...]) -> bytes:
    """The bytes of a picture file of one of some kinds (Pillow's names), once its header promises a reasonable size."""
    try:
        size = Path(path).stat().st_size
        if size > UPLOAD:
            raise InputError(
                f"the file has {size / 1e6:.1f} MB, expected {UPLOAD / 1e6:g} at most: save it smaller"
            )
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise InputError(
            "the file is no longer here, expected one dropped within the hour: drop it again"
        ) from error
    try:
        with PIL.Image.open(io.BytesIO(content), formats=kinds) as picture:
            width, height = picture.size
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise InputError(
            f"the file cannot be read, expected a picture ({' or '.join(kinds)})"
        ) from error
    if width * height > UPLOAD_PIXELS:
        raise InputError(
            f"the picture is {width} x {height}, expected {UPLOAD_PIXELS / 1e6:g} megapixels at most: "
            "save it smaller"
        )
    return content


def read_png(path: str | Path, T: int) -> tuple[Request, str, str]:
    """What a PNG of this page was drawn by: the request, the denoiser, the model's identity; InputError where it carries none."""
    with PIL.Image.open(io.BytesIO(opened(path, ("PNG",)))) as picture:
        try:
            picture.load()
            raw = {"think": 1} | json.loads(
                picture.info["parameters"]
            )  # which pictures of before do not name
            own = {f.name: raw[f.name] for f in dataclasses.fields(Request)}
            denoiser, model = raw["denoiser"], raw["model"]
            if denoiser not in DENOISERS or not isinstance(model, str):
                raise ValueError(f"{denoiser!r} of {model!r}")
        except (OSError, SyntaxError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                "the picture carries no settings, expected a PNG that this page drew"
            ) from error
    return Request.read(own, T), denoiser, model
