"""`qe-dist data`: shows what samples a source has, what is wrong with them, and how a model sees the first one."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qe_pipelines.evaluate import encoder_of
from qe_pipelines.models import Revision, folder_at
from qe_pipelines.progress import set_up_logging
from qe_pipelines.reading import SOURCE, reads_samples

if TYPE_CHECKING:
    from qe_dist.core.sample import Example
    from qe_dist.data.samples import Reading

MOST_SIZES = 10
"""Sizes of images that are shown, the most frequent first."""


@reads_samples
def data(
    source: Annotated[str, typer.Argument(help=SOURCE)],
    model: Annotated[str | None, typer.Option(help="model that they are for")] = None,
    revision: Revision = None,
    save_images: Annotated[Path | None, typer.Option(help="folder for the first sample's images")] = None,
    seed: Annotated[int, typer.Option(help="of a mixture")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    reading: Any = None,
) -> None:
    """Show what SOURCE feeds, and every fault. Ends with 2 where quantize would."""
    set_up_logging(None)
    from qe_dist.core.errors import ConfigError
    from qe_dist.data.samples import load_images, survey

    encoder = None if model is None else encoder_of(folder_at(model, revision))
    found = survey(source, replace(reading, seed=seed), encoder)
    images = load_images(found.samples[0]) if found.samples else []
    first = encoder(found.samples[0], images) if encoder and found.samples else None
    if save_images is not None:
        save_images.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            image.save(save_images / f"{i}.png")
    shown = {"source": source, **described(found), "first": _first(found, first, encoder)}
    typer.echo(json.dumps(shown, indent=1) if as_json else "\n".join(lines_of(shown)))
    bad, count = len(found.left_out), len(found.left_out) + len(found.samples)
    if bad > reading.skip_bad * count or not found.samples:
        raise ConfigError(f"{source}: {bad} of {count} samples are bad; quantize would refuse them")


def described(found: "Reading") -> dict[str, Any]:
    """Counts, as JSON can have them."""
    sizes = Counter(f"{i.size[0]}x{i.size[1]}" for sample in found.samples for i in sample.images)
    tokens = {
        "text": sum(found.lengths) - sum(found.vision), "vision": sum(found.vision), "lengths": spread(found.lengths),
    }  # fmt: skip
    return {
        "samples": len(found.samples),
        "kinds": dict(Counter(sample.kind for sample in found.samples)),
        "images": {"count": sizes.total(), "sizes": dict(sizes.most_common())},
        "tokens": tokens if found.lengths else None,
        "fingerprint": found.fingerprint,
        "notes": [note for note in found.notes if not note.startswith("left out: ")],
        "faults": found.left_out,
    }


def spread(lengths: Sequence[int]) -> dict[str, int]:
    """The least, the median, the 95th percentile and the most."""
    ordered = sorted(lengths)
    places = {"least": 0, "median": (len(ordered) - 1) // 2, "95 %": 95 * (len(ordered) - 1) // 100, "most": -1}
    return {name: ordered[place] for name, place in places.items()} if ordered else {}


def _first(found: "Reading", example: "Example | None", encoder: Any) -> dict[str, Any] | None:
    """The first sample: what it says, and as the model sees it."""
    if not found.samples:
        return None
    sample = found.samples[0]
    said = sample.text or "\n".join(
        f"{message['role']}: " + "".join(part.get("text", "[image]") for part in message["content"])
        for message in sample.messages
    )
    images = [{"name": image.name, "size": "{}x{}".format(*image.size)} for image in sample.images]
    seen = None if example is None else seen_by_model(example, encoder.tokenizer)
    return {"origin": sample.origin, "says": said, "images": images, "model sees": seen}


def seen_by_model(example: "Example", tokenizer: Any) -> str:
    """Its tokens as text, with those of each image counted."""
    pieces = []
    for image, group in groupby(
        zip(example.modality.tolist(), example.input_ids.tolist(), strict=True), lambda x: x[0]
    ):
        ids = [index for _, index in group]
        pieces.append(f"[{len(ids)} tokens of an image]" if image else tokenizer.decode(ids))
    return "".join(pieces)


def lines_of(shown: dict[str, Any]) -> list[str]:
    """What a person reads."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in shown["kinds"].items())
    sizes = list(shown["images"]["sizes"].items())
    more = f", and {len(sizes) - MOST_SIZES} other sizes" if len(sizes) > MOST_SIZES else ""
    lines = [f"{shown['samples']} samples ({kinds})" if kinds else "no sample can be used"]
    if sizes:
        listed = ", ".join(f"{count} of {size}" for size, count in sizes[:MOST_SIZES])
        lines.append(f"{shown['images']['count']} images: {listed}{more}")
    if shown["tokens"] is not None:
        lengths = ", ".join(f"{name} {length}" for name, length in shown["tokens"]["lengths"].items())
        lines.append(f"{shown['tokens']['text']} tokens of text, {shown['tokens']['vision']} of images")
        lines.append(f"tokens of a sample: {lengths}")
    if (first := shown["first"]) is not None:
        images = "; ".join(f"{image['name']}, {image['size']}" for image in first["images"])
        lines += ["", f"first sample, {first['origin']}" + (f" ({images})" if images else ""), ""]
        lines += [f"    {line}" for line in (first["model sees"] or first["says"]).splitlines()]
    lines += ["", *shown["notes"]] if shown["notes"] else []
    lines += ["", f"{len(shown['faults'])} faults:", *shown["faults"]] if shown["faults"] else []
    return lines
