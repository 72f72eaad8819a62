"""Which kernels Triton would compile while groups of all kinds are served; a process of its own, not interpreted.

python -c "from tests.kernels.served import main; main()"    prints what the first call needs, and what later ones add
"""

import json
import os
import subprocess
import sys

import torch

from qe_dist.core.quantized import Factor, GroupInput
from qe_dist.core.scheme import Scheme
from qe_dist.serve import on_kernels
from qe_dist.serve.group import Group

COLUMNS, ROWS, RANK, EXPERTS = 1024, 1088, 40, 3
TOKENS = [*range(1, 155), 160, 176, 192, *range(200, 300, 7), *range(300, 1200, 41), 2047, 2048, 4096, 4097, 5000, 6001]
"""200 of them: every small number, multiples of 16 and odd ones, in every bucket and beyond."""


def factor(*shape: int) -> Factor:
    return Factor(torch.ones(*shape[:-1], shape[-1] // 2, dtype=torch.uint8), torch.ones(shape[:-1]).bfloat16())


def groups() -> dict[str, tuple[str, GroupInput, dict[str, Factor | torch.Tensor]]]:
    """Scheme, input and repair."""
    channels, router = torch.arange(6), torch.ones(EXPERTS, COLUMNS)
    shared = GroupInput(shared_down=factor(RANK, COLUMNS))
    up = {"shared_up": factor(ROWS, RANK)}
    routed = GroupInput(
        shared_down=factor(RANK, COLUMNS), expert_down=factor(EXPERTS, 16, COLUMNS), router=router,
        expert_channels=channels.expand(EXPERTS, -1).contiguous(), salient_channels=channels,
    )  # fmt: skip
    ups = up | {
        "expert_up": factor(EXPERTS, ROWS, 16), "expert_columns": torch.ones(EXPERTS, ROWS, 6).bfloat16(),
        "salient_columns": factor(ROWS, 6),
    }  # fmt: skip
    lists = GroupInput(shared_channels=channels)
    columns = {"shared_columns": torch.ones(ROWS, 6).bfloat16()}
    return {
        "rtn-w4a16g128": ("w4a16g128", GroupInput(), {}),
        "qe-w4a16g128": ("w4a16g128", shared, up),
        "qe-w4a8": ("w4a8", shared, up),
        "lists-w4a8": ("w4a8", lists, columns),
        "experts-w4a8": ("w4a8", routed, ups),
    }


def main(names: list[str]) -> None:
    """names: of groups, with ` by ops` behind them where they are to run by the custom ops."""
    from qe_kernels.layout import Order

    on_kernels.order_for = lambda device: Order.WGMMA
    planned, found, known = on_kernels.planned, {}, set()
    for name in names:
        on_kernels.planned = (lambda tensor: None) if name.endswith(" by ops") else planned
        scheme_name, part, repair = groups()[name.removesuffix(" by ops")]
        found[name] = needed(Scheme.parse(scheme_name), part, repair, known)
    print(json.dumps(found))


def needed(
    scheme: Scheme, part: GroupInput, repair: dict[str, Factor | torch.Tensor], known: set[str]
) -> dict[str, list[str]]:
    """Of two groups, one of which chooses experts for both. known: what others needed at first."""
    from tests.kernels.fake_gpu import counted

    words = torch.zeros(ROWS, COLUMNS * scheme.weight_bits // 32, dtype=torch.int32)
    scale = torch.ones(ROWS, COLUMNS // (scheme.group_size or COLUMNS)).bfloat16()
    source, reader = (Group(on_kernels.Input(part, scheme, COLUMNS)) for _ in range(2))
    for group in (source, reader) if part.router is not None else ():
        source.choose_for(group, part.router)
    linear = on_kernels.Linear(words, scale, dict(repair), scheme, COLUMNS)

    def call(tokens: int) -> None:
        x = torch.zeros(tokens, COLUMNS, dtype=torch.bfloat16)
        for group in (source, reader):
            linear(group.prepare(x), None, x.dtype)

    with counted() as first:
        call(7)
    with counted() as again:
        for tokens in TOKENS:
            call(tokens)
    known |= first
    return {"first": sorted(first), "later": sorted(again - known)}


def measured(names: list[str], specialized: bool = False) -> dict[str, dict[str, list[str]]]:
    """specialized: as if Triton made variants for the number of tokens."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    code = f"from tests.kernels.served import main, specialize; specialize({specialized}); main({names})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def specialize(wanted: bool) -> None:
    from qe_kernels import linear

    if wanted:
        linear._linear.do_not_specialize = []
        for parameter in linear._linear.params:
            if parameter.name == "M":
                parameter.do_not_specialize = False
