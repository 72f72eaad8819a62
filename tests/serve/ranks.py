"""torchrun -m tests.serve.ranks QUESTIONS ANSWERS CHECKPOINT...: what a model that is cut over all ranks says.

QUESTIONS: keyword arguments of the model, as torch.save writes them; ANSWERS: of each checkpoint the fields of an
`Answers`, or what the error was.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qe_dist.core.errors import QEError
from qe_dist.serve.linear import QEInput, QELinear

MAX_TOKENS = 16


@dataclass
class Answers:
    tokens: list[list[int]] = field(default_factory=list)
    """Of each question, greedily."""
    logits: list[Tensor] = field(default_factory=list)
    """[steps, vocabulary]"""
    experts: list[list[Tensor]] = field(default_factory=list)
    """Of each rank: of each call of a group with experts, those of the tokens."""
    weights: list[int] = field(default_factory=list)
    """Of each rank: elements of its codes."""


def ask(model: Any, questions: Sequence[dict[str, Tensor]]) -> Answers:
    found, experts = Answers(), []
    weights = sum(m.weight_packed.numel() for m in model.modules() if isinstance(m, QELinear))

    def note(module: QEInput, _: Any, prepared: Any) -> None:
        if prepared.members:
            expert = torch.full((len(prepared.base),), -1)
            for index, tokens in enumerate(prepared.members):
                expert[tokens] = index
            experts.append(expert)

    for module in model.modules():
        if isinstance(module, QEInput):
            module.register_forward_hook(note)
    for question in questions:
        out = model.generate(
            **question, max_new_tokens=MAX_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True,
            pad_token_id=0,
        )  # fmt: skip
        found.tokens.append(out.sequences[0, question["input_ids"].shape[1] :].tolist())
        found.logits.append(torch.cat(out.logits))
    found.experts, found.weights = [experts], [weights]
    return found


def main(questions: str, answers: str, *checkpoints: str) -> None:
    from transformers import AutoModelForImageTextToText
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
    asked, found = torch.load(questions), {}
    for checkpoint in checkpoints:
        config = DistributedConfig(tp_size=int(os.environ["WORLD_SIZE"]))
        try:
            model = AutoModelForImageTextToText.from_pretrained(
                checkpoint, dtype=torch.float32, distributed_config=config
            )
        except QEError as error:
            found[checkpoint] = str(error)
            continue
        own, ranks = ask(model, asked), [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
        assert all(r.tokens == own.tokens for r in ranks), "ranks give different answers"
        own.experts, own.weights = [r.experts[0] for r in ranks], [r.weights[0] for r in ranks]
        found[checkpoint] = vars(own)
    if dist.get_rank() == 0:
        torch.save(found, answers)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
