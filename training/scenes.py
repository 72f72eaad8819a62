"""Draws the scenes and writes the stories on which the bundled models are trained, calibrated and measured.

A scene is a grid of 28-pixel cells (one merged vision token of the model each), 2 or 3 rows by 2 to 4
columns, with 2 to 4 objects: coloured shapes, and handwritten digits from scikit-learn. Digits of the
training scenes are never drawn in evaluation scenes. Stories are text with something to keep track of.
Everything follows from the seed of the generator that is handed in.
"""

import functools
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

CELL = 28
COLORS = {
    "red": (230, 50, 45), "green": (50, 190, 70), "blue": (60, 100, 240), "yellow": (240, 220, 50),
    "purple": (160, 60, 200), "white": (240, 240, 240),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "ring")
ORDINALS = ("first", "second", "third", "fourth")
NUM_OBJECTS = (2, 2, 3, 3, 4)  # drawn from
TILTS = (-12, -6, 0, 6, 12)  # of handwriting, degrees
KINDS = ("color", "digit", "order", "count", "exists", "describe")
EVAL_DIGITS = 5  # every fifth handwritten digit is kept for evaluation


@dataclass(frozen=True)
class Thing:
    color: str
    name: str  # a shape, or a digit "0" to "9"
    row: int
    column: int

    def __str__(self) -> str:
        return f"{self.color} {self.name}"


@dataclass(frozen=True)
class Scene:
    rows: int
    columns: int
    things: tuple[Thing, ...]  # in reading order


def draw_scene(rng: random.Random) -> Scene:
    rows, columns = rng.randint(2, 3), rng.randint(2, 4)
    cells = [(r, c) for r in range(rows) for c in range(columns)]
    chosen = sorted(rng.sample(cells, rng.choice(NUM_OBJECTS)))
    colors = rng.sample(list(COLORS), rng.randint(3, 5))  # few colours, so that they repeat
    shapes = rng.sample(SHAPES, rng.randint(2, 4))
    things = []
    for r, c in chosen:
        name = str(rng.randrange(10)) if rng.random() < 0.25 else rng.choice(shapes)
        things.append(Thing(rng.choice(colors), name, r, c))
    return Scene(rows, columns, tuple(things))


@functools.cache
def _shape_mask(name: str, size: int) -> np.ndarray:
    """Anti-aliased (size, size) coverage in 0..1."""
    s = size * 4
    canvas = Image.new("L", (s, s))
    pen = ImageDraw.Draw(canvas)
    box = (0, 0, s - 1, s - 1)
    if name == "circle":
        pen.ellipse(box, fill=255)
    elif name == "ring":
        pen.ellipse(box, outline=255, width=s // 5)
    elif name == "square":
        pen.rectangle(box, fill=255)
    elif name == "triangle":
        pen.polygon([(s // 2, 0), (s - 1, s - 1), (0, s - 1)], fill=255)
    else:  # cross
        pen.rectangle((s * 3 // 8, 0, s * 5 // 8, s - 1), fill=255)
        pen.rectangle((0, s * 3 // 8, s - 1, s * 5 // 8), fill=255)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float32) / 255


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return data.images.astype(np.float32) / 16, data.target


@functools.cache
def _digit_indices(digit: int, held_out: bool) -> tuple[int, ...]:
    matching = np.flatnonzero(_digits()[1] == digit)
    return tuple(int(i) for i in matching if (i % EVAL_DIGITS == 0) == held_out)


@functools.lru_cache(maxsize=60_000)
def _digit_mask(index: int, size: int, tilt: int) -> np.ndarray:
    image = Image.fromarray((_digits()[0][index] * 255).astype(np.uint8))
    image = image.resize((4 * size, 4 * size), Image.Resampling.BICUBIC).rotate(tilt, Image.Resampling.BILINEAR)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX), np.float32) / 255


def paint(scene: Scene, rng: random.Random, held_out: bool) -> np.ndarray:
    """The scene as (height, width, 3) bytes; `held_out` picks handwriting that training never shows."""
    noise = np.random.default_rng(rng.getrandbits(32))
    height, width = scene.rows * CELL, scene.columns * CELL
    canvas = np.full((height, width, 3), rng.randint(0, 60), np.float32)
    for thing in scene.things:
        if thing.name.isdigit():
            size = rng.randint(22, 27)
            drawn = rng.choice(_digit_indices(int(thing.name), held_out))
            mask = _digit_mask(drawn, size, rng.choice(TILTS))
        else:
            size = rng.randint(15, 25)
            mask = _shape_mask(thing.name, size)
        y = thing.row * CELL + rng.randint(0, CELL - size)
        x = thing.column * CELL + rng.randint(0, CELL - size)
        shade = rng.uniform(0.85, 1.0)
        color = np.asarray(COLORS[thing.color], np.float32) * shade
        spot = canvas[y : y + size, x : x + size]
        spot += mask[..., None] * (color - spot)
    canvas += noise.normal(0, 3, (height, width, 1)).round()
    return canvas.clip(0, 255).astype(np.uint8)


def ask(scene: Scene, kind: str, rng: random.Random) -> tuple[str, str] | None:
    """A question of one kind and its answer, or None where the scene does not allow one."""
    names = [t.name for t in scene.things]
    if kind == "color":
        single = [t for t in scene.things if names.count(t.name) == 1 and not t.name.isdigit()]
        if not single:
            return None
        thing = rng.choice(single)
        return f"What color is the {thing.name}?", thing.color
    if kind == "digit":
        digits = [t for t in scene.things if t.name.isdigit()]
        colors = [t.color for t in digits]
        single = [t for t in digits if colors.count(t.color) == 1]
        if not single:
            return None
        thing = rng.choice(single)
        return f"Which digit is {thing.color}?", thing.name
    if kind == "order":
        place = rng.randrange(len(scene.things))
        return f"Which object comes {ORDINALS[place]}?", str(scene.things[place])
    if kind == "count":
        what = rng.choice([*SHAPES, "object", "digit", *(t.name for t in scene.things)])
        if what == "object":
            number = len(names)
        elif what == "digit" or what.isdigit():
            what, number = "digit", sum(n.isdigit() for n in names)
        else:
            number = names.count(what)
        plural = "crosses" if what == "cross" else f"{what}s"
        return f"How many {plural} are there?", str(number)
    if kind == "exists":
        if rng.random() < 0.5:
            what, present = rng.choice(SHAPES), names
            question = f"Is there a {what}?"
        else:
            what, present = rng.choice(list(COLORS)), [t.color for t in scene.things]
            question = f"Is there anything {what}?"
        return question, "yes" if what in present else "no"
    return "Describe the image.", ", ".join(str(t) for t in scene.things)


NAMES = ("Mia", "Tom", "Ana", "Ben", "Eva", "Leo", "Zoe", "Max")
FRUITS = ("apple", "pear", "plum", "lemon", "melon", "nut")
PLACES = ("river", "market", "garden", "school", "forest", "harbor", "library", "bridge")
MOODS = ("happy", "tired", "proud", "calm", "curious", "hungry")
WEATHER = ("The sun is warm", "The wind is cold", "It is raining", "Snow is falling")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def _some(number: int, fruit: str) -> str:
    return f"{NUMBERS[number]} {fruit}" + ("" if number == 1 else "s")


def tell(rng: random.Random) -> str:
    """A story of about 80 tokens in which who is where, how many things they have and why must be kept."""
    a, b = rng.sample(NAMES, 2)
    fruit, place, color = rng.choice(FRUITS), rng.choice(PLACES), rng.choice(list(COLORS))
    have, mood, weather = rng.randint(3, 10), rng.choice(MOODS), rng.choice(WEATHER)
    give = rng.randint(1, have - 1)
    parts = [
        rng.choice([f"{a} walks to the {place}.", f"{a} is at the {place}."]),
        f"{weather}, and {a} feels {mood}.",
        f"{a} has {_some(have, fruit)} in a {color} bag.",
        rng.choice([f"{b} comes to the {place} too.", f"Then {b} comes along."]),
        f"{a} gives {b} {_some(give, fruit)}.",
        f"Now {a} has {_some(have - give, fruit)} and {b} has {_some(give, fruit)}.",
        rng.choice(
            [
                f"{b} asks {a}: where are we? We are at the {place}, says {a}.",
                f"{b} asks {a}: what color is your bag? My bag is {color}, says {a}.",
                f"{b} asks {a}: how do you feel? I feel {mood}, says {a}.",
            ]
        ),
        rng.choice([f"They go home from the {place} together.", f"{b} thanks {a} and leaves."]),
    ]
    return " ".join(parts)


def converse(scene: Scene, rng: random.Random, questions: int) -> list[tuple[str, str, str]]:
    """(kind, question, answer) turns: one description and several questions, in any order."""
    turns = [("describe", *ask(scene, "describe", rng))]
    while len(turns) <= questions:
        kind = rng.choice(KINDS[:-1])
        asked = ask(scene, kind, rng)
        if asked is not None:
            turns.append((kind, *asked))
    rng.shuffle(turns)
    return turns


def write_sets(
    folder: Path, calibration: int = 128, evaluation: int = 210, texts: int = 40, calibration_seed: int = 11
) -> None:
    """Writes calibration.jsonl and evaluation.jsonl with their images; the two use disjoint seeds."""
    for name, seed, count, held_out in (
        ("calibration", calibration_seed, calibration, False),
        ("evaluation", 22, evaluation, True),
    ):
        images = folder / name
        images.mkdir(parents=True, exist_ok=True)
        rng = random.Random(seed)
        lines = []
        for i in range(count):
            path = images / f"{i:03d}.png"
            kind = KINDS[i % len(KINDS)]
            asked = None
            while asked is None:
                scene = draw_scene(rng)
                asked = ask(scene, kind, rng)
            Image.fromarray(paint(scene, rng, held_out)).save(path, optimize=True)
            image = str(path.relative_to(folder))
            if held_out:
                lines.append({"image": image, "prompt": asked[0], "answer": asked[1], "kind": kind})
            else:
                turns = converse(scene, rng, questions=2)
                lines.append({"messages": _chat(image, turns)})
        lines += [{"text": tell(rng)} for _ in range(texts)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)


def _chat(image: str, turns: list[tuple[str, str, str]]) -> list[dict]:
    messages = []
    for i, (_, question, answer) in enumerate(turns):
        content = [{"type": "image", "image": image}] if i == 0 else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


if __name__ == "__main__":
    write_sets(Path(__file__).parents[1] / "models" / "data")
