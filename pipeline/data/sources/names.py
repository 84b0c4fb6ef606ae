"""Captions that the names of files and folders carry."""

import re
from collections.abc import Collection
from pathlib import PurePosixPath

# Words that cameras, phones and programs write into file names.
GENERIC_WORD = re.compile(
    "am|at|burst|copy|dji|download|dsc|dscf|dscn|edited|fb|file|frame|from|gopr|images?|imgs?|mvimg"
    "|of|pano|photos?|pics?|pictures?|pm|pxl|received|sample|scan|screen|screenshot|shot|snapchat"
    "|temp|tmp|unnamed|untitled|vid|whatsapp",
    re.IGNORECASE,
)
HASH = re.compile(r"(?=.*\d)[0-9a-f]{8,}", re.IGNORECASE)
# A folder of kohya's trainer: how often an epoch repeats its images, and their class.
REPEATS_FOLDER = re.compile(r"\d+_(.+)")


def name_caption(name: str) -> str:
    """Return the caption that a name without suffix carries, "" for IMG_0001, hashes, numbers."""
    if HASH.fullmatch(re.sub(r"[\W_]", "", name)):
        return ""
    has_word = any(is_word(part) for part in re.split(r"[\W_]+", name))
    return name.replace("_", " ") if has_word else ""


def is_word(part: str) -> bool:
    """Return whether a part of a name, such as `heart` or `heart2`, is a word."""
    letters = part.strip("0123456789")
    if not letters.isalpha() or HASH.fullmatch(part) or GENERIC_WORD.fullmatch(letters):
        return False
    # Cameras write P1010023.
    return letters == part or len(letters) > 2


def class_captions(names: Collection[str]) -> dict[str, str]:
    """Return the captions of images in class folders by relative name, {} if they are in none.

    Folders are classes if each image is in one, and each name carries a caption. A single folder
    is one if it is kohya's or if file names carry no caption.
    """
    folders = {name: PurePosixPath(name).parent.name for name in names}
    classes = {}
    for folder in folders.values():
        repeats = REPEATS_FOLDER.fullmatch(folder)
        classes[folder] = name_caption(repeats[1] if repeats else folder)
    if not all(classes.values()):
        return {}
    is_kohya = any(map(REPEATS_FOLDER.fullmatch, classes))
    described = all(name_caption(PurePosixPath(name).stem) for name in names)
    if len(classes) == 1 and described and not is_kohya:
        return {}
    return {name: classes[folder] for name, folder in folders.items()}
