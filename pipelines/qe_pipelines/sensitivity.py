"""`qe-dist sensitivity`: measures how much MBQ should weight image tokens, on a model that fits into memory."""

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qe_pipelines.evaluate import encode
from qe_pipelines.models import Revision, folder_at
from qe_pipelines.progress import set_up_logging
from qe_pipelines.reading import SOURCE, reads_samples


@reads_samples
def sensitivity(
    model: Annotated[str, typer.Argument(help="model in full precision")],
    data: Annotated[str, typer.Option(help=f"with images and answers: {SOURCE}")],
    revision: Revision = None,
    reading: Any = None,
) -> None:
    """Measure on MODEL how much an image token counts beside a text token, for the transform mbq of a recipe.

    A backward pass for each sample: the model is held in float32, in this process alone.
    """
    set_up_logging(None)
    from qe_dist.checkpoint.sensitivity import check_memory
    from qe_dist.checkpoint.sensitivity import sensitivity as measure
    from qe_dist.serve.loading import load_model

    folder = folder_at(model, revision)
    arch, examples = encode(folder, data, reading)
    check_memory(2 * sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    found = measure(load_model(folder).float(), arch, examples)
    table = Table("output of", "image / text", "image / answer", title="mean |dLoss/dy|")
    for row in zip(found.places, found.image_to_text, found.image_to_answer, strict=True):
        table.add_row(row[0], *(f"{ratio:.2f}" for ratio in row[1:]))
    Console().print(table)
    typer.echo(f'transform = {{ name = "mbq", image_weight = {found.image_weight:.3g} }}')
