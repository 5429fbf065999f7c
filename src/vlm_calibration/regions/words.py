"""English word lists for the describer: nouns that name no object, groups, and adjectives that do not describe appearance."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _with_plurals(text: str) -> frozenset[str]:
    words = _words(text)
    return words | {w + "s" for w in words} | {w[:-1] + "ies" for w in words if w.endswith("y")}


ATTRIBUTES = _with_plurals("""
    color colour shape size height width length weight age gender sex material pattern texture style design brand name word letter number
    digit text title logo time hour date day month year season holiday occasion event weather temperature sport game activity action job
    occupation profession mood atmosphere emotion expression feeling condition state position direction angle distance speed side country
    nationality language flavor flavour price purpose reason relationship
""")
"""Questions about these ask for no object: "What colour is the bus?"."""

GENERIC = _with_plurals(
    "kind type sort object thing item piece subject something anything element feature part stuff"
)
"""Placeholders for the object that the answer names: "What object is on the desk?"."""

PICTURE = _with_plurals("""
    image picture photo photograph scene view frame background foreground left right top bottom middle center centre corner front back end
    edge rest area place location spot perspective shot caption description detail sentence statement question answer option example
""")
"""The picture itself and positions in it."""

COLOURS = _words("""
    black white red green blue yellow brown grey gray pink purple beige tan maroon turquoise silver gold
""")
"""The tagger reads these as nouns when they stand alone. "Orange" is missing because it is also a fruit."""

LOOKS = COLOURS | _words("""
    orange cream violet crimson emerald bronze square oval circle semicircle plastic metal wood steel iron leather stone brick concrete marble
    ceramic porcelain cotton linen wool silk denim
""")
"""Colours, shapes and materials: nouns that describe appearance, as in "Is the cup plastic?"."""

TAGS = {"doing": "VDG", "no": "AT0", "present": "AJ0", "bears": "NN2"} | dict.fromkeys(
    ("remote", "drier", "bear"), "NN1"
)
"""C5 tags of words that the tagger usually gets wrong in questions; a drier is a hair drier."""

NO_OBJECT = (ATTRIBUTES | COLOURS | GENERIC | PICTURE) | _with_plurals("""
    morning noon afternoon evening night midnight dawn dusk sunset sunrise today winter spring summer autumn fall minute second moment week
    way lot amount percent pair half herd flock pack bunch dozen series collection total maximum minimum safety fun order fact case kind
    sense impression idea thought interest addition relation comparison contrast love joy happiness sadness anger fear peace silence beauty
    comfort work use help care attention focus variety balance bit contact interaction difference speech conversation discussion breakfast
    lunch dinner meal soccer tennis golf hockey surfing skiing snowboarding skateboarding swimming fishing racing tradition culture history
    north south east west one none both other presence absence
""")
"""Nouns that name nothing a detector can find."""

VAGUE = _words("""
    main only same different other another many few several various certain such more most less own whole entire visible present possible
    likely first second third next last left right top bottom front back upper lower middle central nearest closest farthest overall general
    specific particular apparent single
""")
"""Adjectives that do not describe appearance."""
