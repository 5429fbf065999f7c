"""What makes a scene naturally hard: the kinds of hard scene, look-alikes of the classes, and unusual pictures of them.

The base model was trained on easy scenes alone. Sizes, overlaps and pictures are chosen on development scenes so that it is right
65 to 85% of the time on each kind, as real models are on the tail of a real data set.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

HARD_KINDS = ("small", "overlapping", "look_alike", "unusual")
"""small: little objects; overlapping: objects partly covered by a neighbour; look_alike: an object of no class that resembles one,
about which the question with the answer "No" asks; unusual: other pictures of the classes."""


class LookAlike(NamedTuple):
    """An object that is not of any class.

    Attributes:
        name: what it is.
        character: its picture.
        resembles: the class that it resembles.
    """

    name: str
    character: str
    resembles: str


LOOK_ALIKES = tuple(
    LookAlike(*words.split())
    for words in (
        "wolf 🐺 dog",
        "fox 🦊 dog",
        "leopard 🐆 cat",
        "llama 🦙 horse",
        "deer 🦌 horse",
        "goat 🐐 horse",
        "bison 🦬 cow",
        "rhinoceros 🦏 elephant",
        "hippopotamus 🦛 elephant",
        "whale 🐳 fish",
        "bat 🦇 bird",
        "tomato 🍅 apple",
        "cherries 🍒 apple",
        "corn 🌽 banana",
        "moon 🌙 banana",
        "cookie 🍪 pizza",
        "flatbread 🫓 pizza",
        "pie 🥧 cake",
        "custard 🍮 cake",
        "teapot 🫖 cup",
        "bowl 🥣 cup",
        "carriage 🚃 bus",
        "newspaper 📰 book",
        "envelope ✉ book",
        "folder 📁 book",
        "violin 🎻 guitar",
        "broccoli 🥦 tree",
        "cactus 🌵 tree",
    )
)

UNUSUAL: dict[str, str] = {
    "dog": "🐶",
    "horse": "🐴",
    "cow": "🐮",
    "pig": "🐷",
    "bird": "🦆",
    "cake": "🍰",
    "cup": "🥤",
    "car": "🚘🏎",
    "boat": "🛥🚣⛴",
    "bed": "🛌",
    "clock": "⏰🕘🕔",
    "book": "📚📘",
    "umbrella": "☔🌂",
    "ball": "⚾🎱",
    "tree": "🌲🌴🎄",
    "house": "🏘",
}
"""Other pictures of a class, one a character."""


def hard_kind(seed: tuple[int, int], share: float) -> str:
    """The kind of the scene of this seed where a share of the scenes, in [0, 1], is hard: "" for an easy one.

    A scene that is hard at one share is hard in the same way at every larger one.
    """
    rng = np.random.default_rng((*seed, 4))
    return HARD_KINDS[int(rng.integers(len(HARD_KINDS)))] if rng.random() < share else ""
