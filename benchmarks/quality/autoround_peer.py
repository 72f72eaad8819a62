"""AutoRound in one process, measured, in a virtual environment of its own (`make peer`); imports nothing of ours.

    .venv-autoround/bin/python benchmarks/quality/autoround_peer.py MODEL OUTPUT --recipe w4a16g64-200 \\
        --calibration FILE

A recipe is a number format and the number of steps of a block; 200 is AutoRound's default, as is all that is not said
here, but for torch.compile, which on a CPU takes longer than it saves. Weights are symmetric, in groups. MODEL is a
Llama: of a Qwen2-VL, AutoRound takes another path, which wants a processor. FILE holds tokenized samples (`peers.py`
writes it); AutoRound wants all of one length, so each is cut to LENGTH. Weights alone are written in AutoRound's own
format, and with activations as rounded values, which is all that AutoRound has for them; `dense.py` reads both.
"""

import re
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from measured import Arguments, Cost
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTH = 256
BATCH = 8


def scheme(recipe: str) -> tuple[dict[str, Any], int]:
    """AutoRound's description of the number format, and the steps."""
    match = re.fullmatch(r"w(?P<w>\d+)a(?P<a>\d+)g(?P<g>\d+)-(?P<steps>\d+)", recipe)
    if match is None:
        raise SystemExit(f"recipe {recipe!r} is not wXaYgZ-STEPS")
    weights = {"bits": int(match["w"]), "group_size": int(match["g"]), "sym": True, "data_type": "int"}
    activations: dict[str, Any] = {"act_bits": 16}
    if match["a"] != "16":
        activations = {
            "act_bits": int(match["a"]), "act_group_size": -1, "act_sym": True, "act_dynamic": True,
            "act_data_type": "int",
        }  # fmt: skip
    return weights | activations, int(match["steps"])


def batches(calibration: Path) -> DataLoader[Any]:
    samples = {int(n.split(".")[0]): t[0] for n, t in load_file(calibration).items() if n.endswith(".input_ids")}
    cut: list[Tensor] = [samples[i][:LENGTH] for i in sorted(samples) if len(samples[i]) >= LENGTH]
    return DataLoader(cut, batch_size=BATCH, collate_fn=lambda part: {"input_ids": torch.stack(part)})  # type: ignore[arg-type]


def main() -> None:
    asked = Arguments.parse(__doc__)
    torch.set_num_threads(asked.threads)
    cost = Cost()
    form, steps = scheme(asked.recipe)
    with cost.of("load"):
        model = AutoModelForCausalLM.from_pretrained(asked.model, dtype="auto").eval()
        tokenizer = AutoTokenizer.from_pretrained(asked.model)
    data = batches(asked.calibration)
    with cost.of("tune"):
        count = sum(len(batch["input_ids"]) for batch in data)
        rounder = AutoRound(
            model, tokenizer, scheme=form, dataset=data, seqlen=LENGTH, nsamples=count, batch_size=BATCH, iters=steps,
            device_map="cpu", enable_torch_compile=False,
        )  # fmt: skip
        rounder.quantize_and_save(str(asked.output), format="auto_round" if form["act_bits"] == 16 else "fake")
    for config in list(asked.output.glob("*/config.json")):  # it chooses a name for the folder inside
        for path in config.parent.iterdir():
            path.rename(asked.output / path.name)
        config.parent.rmdir()
    cost.print(form["bits"] + 16 / form["group_size"], ("auto-round", "torch", "transformers"))


if __name__ == "__main__":
    main()
