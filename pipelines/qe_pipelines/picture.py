"""Shows an image in a terminal, as coloured half blocks of two pixels to a character."""

from pathlib import Path

from PIL import Image
from rich.text import Text

from qe_dist.data.images import decode

WIDTH = 48


def picture(path: Path) -> Text:
    """The path of an image, and the image as text of WIDTH characters per line."""
    image = decode(path, str(path))
    height = max(2, round(WIDTH * image.height / image.width) // 2 * 2)
    pixels = image.resize((WIDTH, height), Image.Resampling.BOX)
    text = Text(f"{path}\n")
    for y in range(0, height, 2):
        for x in range(WIDTH):
            upper, lower = (pixels.getpixel((x, row)) for row in (y, y + 1))
            text.append("▀", style=f"rgb{upper} on rgb{lower}".replace(" ", "").replace("on", " on "))
        text.append("\n")
    return text
