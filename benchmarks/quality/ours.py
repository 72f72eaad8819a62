"""qe_dist in one process, measured; `peer.py` is the other side.

    python benchmarks/quality/ours.py MODEL OUTPUT --recipe smoothquant-w4a8 --calibration FILE

A recipe is what `qe-dist quantize --recipe` takes.
"""

from measured import Arguments, Cost

from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import quantize
from qe_dist.io.checkpoint import read_manifest
from qe_dist.methods.recipes import load_recipe


def main() -> None:
    asked = Arguments.parse(__doc__)
    run = RunConfig(asked.model, load_recipe(asked.recipe), asked.calibration, asked.output, threads=asked.threads)
    cost = Cost()
    with cost.of("quantize"):
        quantize(run)
    cost.print(read_manifest(asked.output).bits_per_weight, ("qe-dist", "torch", "transformers"))


if __name__ == "__main__":
    main()
