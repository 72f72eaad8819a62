"""Draws the pictures of the real model and asks about them: text, digits, charts, shapes and tables.

A picture has 224 by 224 pixels: 8 by 8 cells of 28 pixels, each of which Qwen2-VL merges into one token. Everything
follows from a seed. Training and unseen pictures use disjoint seeds; one in `HELD_OUT` of all codes and numbers, and of
scikit-learn's handwritten digits, occurs in unseen pictures only. Words, names and colours are those of the lists
below in both.
"""

import functools
import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits

SIZE, CELL, PATCH, GRID = 224, 28, 14, 8
KINDS = ("text", "digits", "charts", "shapes", "tables")
SPLITS = ("train", "unseen")
HELD_OUT = 5
COLORS = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 90, 230), "yellow": (235, 210, 40),
    "purple": (150, 60, 190), "orange": (245, 140, 30), "black": (15, 15, 15), "white": (245, 245, 245),
}  # fmt: skip
ON_LIGHT = ("red", "green", "blue", "purple", "orange", "black")
ON_DARK = ("red", "green", "blue", "yellow", "purple", "orange", "white")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star", "heart")
PLACES = (
    ("top left", "top", "top right"), ("left", "center", "right"), ("bottom left", "bottom", "bottom right"),
)  # fmt: skip
ORDINALS = ("first", "second", "third", "fourth")
NAMES = (
    "Tom", "Ben", "Max", "Sam", "Bob", "Kim", "Dan", "Tim", "Jim", "Ann", "Ray", "Lee", "Jon", "John", "Mary",
    "Paul", "Anna", "Mark", "Jack", "Adam", "Alex",
)  # fmt: skip
GOODS = ("apples", "books", "cats", "dogs", "cars")
LETTERS = "ABCDEFGHKLMNPRSTUVXYZ"  # without those that look like a digit
WORDS = (
    "ball", "bank", "bird", "boat", "book", "box", "bus", "cat", "coin", "dog", "door", "eye", "face", "farm",
    "fire", "fish", "flag", "food", "game", "gate", "gold", "hair", "hand", "hat", "hill", "home", "ice", "king",
    "lake", "leaf", "map", "milk", "mind", "moon", "oil", "rain", "rice", "road", "rose", "salt", "ship", "sky",
    "song", "star", "sun", "tree", "wind",
)  # fmt: skip
Cell = tuple[int, int]


@dataclass
class Picture:
    """A picture, what may be asked about it, and what its cells show (words, for the first stage of training)."""

    kind: str
    pixels: np.ndarray
    """(224, 224, 3) bytes."""
    asks: list[tuple[str, str]] = field(default_factory=list)
    cells: dict[Cell, tuple[str, ...]] = field(default_factory=dict)
    letters: dict[Cell, str] = field(default_factory=dict)
    """The character that a patch of 14 by 14 pixels is part of, by row and column of patches."""


def is_held_out(what: str) -> bool:
    """Whether a code or number is drawn in unseen pictures only."""
    return zlib.crc32(what.encode()) % HELD_OUT == 0


@functools.cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf" / f"{name}.ttf", size)


class _Canvas:
    """A picture in the making: plain background, light or dark, and a little noise at the end."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.dark = rng.random() < 0.35
        level = rng.randint(0, 45) if self.dark else rng.randint(215, 255)
        self.image = Image.new("RGB", (SIZE, SIZE), (level, level, level))
        self.pen = ImageDraw.Draw(self.image)
        self.palette = ON_DARK if self.dark else ON_LIGHT
        self.ink = "white" if self.dark else "black"
        self.font = rng.choice(("DejaVuSansMono", "DejaVuSansMono-Bold"))
        self.cells: dict[Cell, tuple[str, ...]] = {}
        self.letters: dict[Cell, str] = {}

    def colors(self, count: int) -> list[str]:
        return self.rng.sample(self.palette, count)

    def shade(self, color: str) -> tuple[int, ...]:
        factor = self.rng.uniform(0.85, 1.0)
        return tuple(round(channel * factor) for channel in COLORS[color])

    def mark(self, box: tuple[float, float, float, float], words: tuple[str, ...]) -> None:
        """Notes that the cells of a box of pixels show these words; what is drawn later on a cell wins."""
        left, top, right, bottom = box
        for row in range(int(top) // CELL, (int(bottom) - 1) // CELL + 1):
            for column in range(int(left) // CELL, (int(right) - 1) // CELL + 1):
                if 0 <= row < GRID and 0 <= column < GRID:
                    self.cells[row, column] = words

    def write(self, x: int, y: int, text: str, color: str, advance: int = 14) -> tuple[int, int, int, int]:
        """One line of text in cells of `advance` by 28 pixels, from (x, y); its box."""
        font = _font(self.font, 22 if advance == 14 else 34)
        dx, dy = self.rng.randint(-1, 1), self.rng.randint(-1, 1)
        fill = self.shade(color)
        for i, letter in enumerate(text):
            self.pen.text((x + (i + 0.5) * advance + dx, y + 14 + dy), letter, fill, font, anchor="mm")
            for column in range(advance // PATCH):
                for row in range(2):
                    self.letters[y // PATCH + row, (x + i * advance) // PATCH + column] = letter
        return x, y, x + advance * len(text), y + CELL

    def finish(self, kind: str, asks: list[tuple[str, str]]) -> Picture:
        noise = np.random.default_rng(self.rng.getrandbits(32))
        grain = noise.integers(-5, 6, (SIZE, SIZE, 1), dtype=np.int16)
        pixels = (np.asarray(self.image, np.int16) + grain).clip(0, 255).astype(np.uint8)
        return Picture(kind, pixels, asks, self.cells, self.letters)


def _draw_text(rng: random.Random, unseen: bool) -> Picture:
    canvas = _Canvas(rng)
    if rng.random() < 0.3:
        return _draw_code(canvas, unseen)
    word, color = rng.choice(WORDS), rng.choice(canvas.palette)
    x = CELL * rng.randint(0, (SIZE - PATCH * len(word)) // CELL)
    canvas.mark(canvas.write(x, CELL * rng.randrange(GRID), word, color), (word, color))
    return canvas.finish("text", [("What does the sign say?", word), ("What color is the word?", color)])


def _draw_code(canvas: _Canvas, unseen: bool) -> Picture:
    rng = canvas.rng
    while True:
        code = rng.choice(LETTERS) + rng.choice("23456789")
        if is_held_out(code) == unseen:
            break
    color = rng.choice(canvas.palette)
    _write_apart(canvas, code, color)
    return canvas.finish("text", [("What is the code?", code), ("What color is the code?", color)])


def _write_apart(canvas: _Canvas, text: str, color: str) -> None:
    """Large characters, one per cell."""
    column, row = canvas.rng.randint(0, GRID - len(text)), canvas.rng.randrange(GRID)
    canvas.write(column * CELL, row * CELL, text, color, CELL)
    for i, letter in enumerate(text):
        canvas.cells[row, column + i] = (letter, ORDINALS[i], color)


@functools.cache
def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return (data.images * (255 / 16)).astype(np.uint8), data.target


@functools.cache
def handwritten(digit: int, unseen: bool) -> tuple[int, ...]:
    """Indices into scikit-learn's digits: those of unseen pictures, or those of training pictures."""
    return tuple(int(i) for i in np.flatnonzero(_handwriting()[1] == digit) if (i % HELD_OUT == 0) == unseen)


def _draw_digits(rng: random.Random, unseen: bool) -> Picture:
    canvas = _Canvas(rng)
    color = rng.choice(canvas.palette)
    if rng.random() < 0.35:
        while True:
            number = str(rng.randint(10, 99))
            if is_held_out(number) == unseen:
                break
        _write_apart(canvas, number, color)
        return canvas.finish("digits", [("Which number is shown?", number), ("What color is the number?", color)])
    digit, row, column = rng.randrange(10), rng.randrange(3), rng.randrange(3)
    size = rng.randint(52, 64)
    picture = Image.fromarray(_handwriting()[0][rng.choice(handwritten(digit, unseen))])
    mask = picture.resize((size, size), Image.Resampling.BICUBIC)
    mask = mask.rotate(rng.randint(-12, 12), Image.Resampling.BILINEAR)
    x, y = (84 * place + rng.randint(-3, 3) + (56 - size) // 2 for place in (column, row))
    canvas.image.paste(canvas.shade(color), (x, y), mask)
    canvas.mark((84 * column, 84 * row, 84 * column + 56, 84 * row + 56), (str(digit), color))
    return canvas.finish("digits", [("Which digit is written?", str(digit)), ("What color is the digit?", color)])


def _draw_chart(rng: random.Random, unseen: bool) -> Picture:
    canvas = _Canvas(rng)
    count = rng.randint(2, 4)
    values, colors, letters = rng.sample(range(1, 10), count), canvas.colors(count), rng.sample(LETTERS, count)
    grey = (110, 110, 110) if canvas.dark else (170, 170, 170)
    for line in range(0, 11, 2):
        canvas.pen.line((0, 196 - 16 * line, SIZE, 196 - 16 * line), fill=grey)
    shift = rng.randint(0, 8 - 2 * count)
    labelled = rng.random() < 0.6
    asks = []
    for i, (value, color, letter) in enumerate(zip(values, colors, letters, strict=True)):
        column, top = shift + 2 * i, 196 - 16 * value
        x = column * CELL + rng.randint(-1, 1)
        extreme = "highest" if value == max(values) else "lowest" if value == min(values) else "middle"
        words = (color, str(value), letter, extreme)
        canvas.pen.rectangle((x, top, x + 27, 195), fill=canvas.shade(color))
        canvas.mark((column * CELL, top, column * CELL + 28, 196), (color, str(value), extreme))
        canvas.mark(canvas.write(column * CELL, 196, letter, canvas.ink, CELL), words)
        if labelled:
            canvas.write(column * CELL, top - 27, str(value), canvas.ink, CELL)
        if extreme != "middle":
            asks += [(f"Which color is {extreme}?", color), (f"Which letter is {extreme}?", letter)]
            asks.append((f"What is the {extreme} value?", str(value)))
    asks.append(("How many bars are there?", str(count)))
    return canvas.finish("charts", asks)


def _star(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, radius, radius * 0.42)
    return list(zip(x + radii * np.cos(angles), y + radii * np.sin(angles), strict=True))


@functools.cache
def shape_mask(name: str, size: int) -> Image.Image:
    """Anti-aliased coverage, (size, size)."""
    s = size * 4
    mask = Image.new("L", (s, s))
    pen = ImageDraw.Draw(mask)
    box = (0, 0, s - 1, s - 1)
    if name == "circle":
        pen.ellipse(box, fill=255)
    elif name == "ring":
        pen.ellipse(box, outline=255, width=s // 5)
    elif name == "square":
        pen.rectangle(box, fill=255)
    elif name == "triangle":
        pen.polygon([(s // 2, 0), (s - 1, s - 1), (0, s - 1)], fill=255)
    elif name == "star":
        pen.polygon(_star(s / 2, s / 2, s / 2), fill=255)
    elif name == "heart":
        pen.ellipse((0, 0, s * 0.53, s * 0.53), fill=255)
        pen.ellipse((s * 0.47, 0, s - 1, s * 0.53), fill=255)
        pen.polygon([(s * 0.06, s * 0.42), (s * 0.5, s * 0.25), (s * 0.94, s * 0.42), (s * 0.5, s - 1)], fill=255)
    else:  # cross
        pen.rectangle((s * 3 // 8, 0, s * 5 // 8, s - 1), fill=255)
        pen.rectangle((0, s * 3 // 8, s - 1, s * 5 // 8), fill=255)
    return mask.resize((size, size), Image.Resampling.BOX)


def _draw_shapes(rng: random.Random, unseen: bool) -> Picture:
    canvas = _Canvas(rng)
    count = rng.randint(1, 3)
    names, colors = rng.sample(SHAPES, count), canvas.colors(count)
    places = rng.sample([(r, c) for r in range(3) for c in range(3)], count)
    asks = [("How many shapes are there?", str(count))]
    for name, color, (row, column) in zip(names, colors, places, strict=True):
        size, place = rng.randint(38, 54), PLACES[row][column]
        x, y = (84 * p + (56 - size) // 2 + rng.randint(-2, 2) for p in (column, row))
        canvas.image.paste(canvas.shade(color), (x, y), shape_mask(name, size))
        canvas.mark((84 * column, 84 * row, 84 * column + 56, 84 * row + 56), (name, color, *place.split()))
        asks += [(f"What color is the {name}?", color), (f"Which shape is {color}?", name)]
    return canvas.finish("shapes", asks)


def _draw_table(rng: random.Random, unseen: bool) -> Picture:
    canvas = _Canvas(rng)
    people, columns = rng.randint(2, 3), 1
    names, goods = rng.sample(NAMES, people), rng.sample(GOODS, columns)
    ink, grey = canvas.ink, (90, 90, 90) if canvas.dark else (190, 190, 190)
    top = rng.randint(0, GRID - 1 - people)
    starts = (70, 154)  # pixels, of columns of values
    for line in range(people + 2):
        canvas.pen.line((0, (top + line) * CELL, SIZE, (top + line) * CELL), fill=grey)
    header = rng.choice(canvas.palette)
    asks = []
    for good, x in zip(goods, starts, strict=False):
        canvas.mark(canvas.write(x, top * CELL, good, header), (good,))
    for i, name in enumerate(names):
        y = (top + 1 + i) * CELL
        values = rng.sample(range(1, 10), columns)
        canvas.mark(canvas.write(0, y, name, ink), (name,))
        for good, value, x in zip(goods, values, starts, strict=False):
            box = canvas.write(x + 14, y, str(value), ink, CELL)
            canvas.mark(box, (name, good, str(value)))
            asks.append((f"How many {good} does {name} have?", str(value)))
    asks += [("Which name is in the first row?", names[0]), ("Which name is in the last row?", names[-1])]
    return canvas.finish("tables", asks)


_DRAW = {
    "text": _draw_text, "digits": _draw_digits, "charts": _draw_chart, "shapes": _draw_shapes, "tables": _draw_table,
}  # fmt: skip


def draw(kind: str, seed: int, split: str) -> Picture:
    """The picture of a kind, number `seed` of its split."""
    rng = random.Random(f"{split}/{kind}/{seed}")
    return _DRAW[kind](rng, split == "unseen")


def samples(counts: int | dict[str, int], seed: int, split: str) -> Iterator[tuple[Image.Image, str, str, str]]:
    """(picture, kind, question, answer), one question each, the kinds in turn.

    `counts` is the number of samples, or that of each kind. Samples of different seeds share no picture.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, found {split!r}")
    if isinstance(counts, int):
        counts = {kind: (counts + len(KINDS) - 1 - i) // len(KINDS) for i, kind in enumerate(KINDS)}
    for number in range(max(counts.values())):
        for kind, count in counts.items():
            if number < count:
                picture = draw(kind, (seed << 32) + number, split)
                question, answer = random.Random(f"ask/{seed}/{number}/{kind}").choice(picture.asks)
                yield Image.fromarray(picture.pixels), kind, question, answer


def write_samples(folder: Path, name: str, counts: int | dict[str, int], seed: int, split: str) -> Path:
    """Writes `name.jsonl` and its pictures, `name/00000.png` on, into a folder; the path of the former."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (image, kind, question, answer) in enumerate(samples(counts, seed, split)):
        image.save(folder / name / f"{i:05d}.png")
        lines.append({"image": f"{name}/{i:05d}.png", "prompt": question, "answer": answer, "kind": kind})
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
