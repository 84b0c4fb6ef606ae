"""Sixty prompts that name no image of the styles dataset: what a visitor may type.

They were chosen before any model was trained on the dataset, which leaves out the variations that
they name. The first twenty are those of the datasets of one style.
"""

from pipeline.data.emoji.recolour import OPEN_PROMPTS
from pipeline.data.emoji.styles import STYLES
from pipeline.diffusion.captions import simplify

NEW_PROMPTS = """
purple fox
blue apple
green elephant
red penguin
pink rocket
blue rose
orange umbrella
red guitar
pink car
purple crown
green moon
blue banana
yellow elephant
red owl
green bear
purple tree
two cats
three apples
two rockets
three roses
two penguins
three bananas
blue dog, noto style
a red elephant in 3d style
flat style purple dog
pink cat, blob style
orange cow in twemoji style
green pizza, 3d style
a blue tree in noto style
yellow rocket, flat style
red frog in blob style
The Blue Fox!
a yellow bus.
RED CAT
an orange dog
a happy dog
a sad dog
an angry rabbit
a purple pig!
the pink tree
"""
STYLE_PROMPTS = (*OPEN_PROMPTS, *NEW_PROMPTS.strip().splitlines())


def subject_words(prompt: str) -> set[str]:
    """Return the words of a prompt that say what it shows: no articles, and not its style."""
    return set(simplify(prompt).split()) - {"in", "style", *STYLES}


SUBJECTS = [subject_words(prompt) for prompt in STYLE_PROMPTS]


def names_prompt(caption: str) -> bool:
    """Return whether a caption says all that one of the prompts shows, in whatever style."""
    words = set(simplify(caption).split())
    return any(subject <= words for subject in SUBJECTS)
