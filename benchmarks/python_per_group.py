"""Microseconds of Python that an input group costs at run time: its preparation and one stacked linear. Needs no GPU.

    python benchmarks/python_per_group.py                writes benchmarks/results/python_per_group.json
    python benchmarks/python_per_group.py --code DIR     beside those of another checkout

Kernels are compiled for Hopper and handed to a driver that launches nothing, so what is left is Python, torch's
allocations and Triton's way to a launch, without the driver's call itself. Counted is processor time, for the machine
is shared; every checkout that is named is measured in turn with this one, in a process of its own, and the fastest of
many short rounds counts.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLUMNS, ROWS, RANK, EXPERTS = 1024, 1024, 64, 8
ROUNDS, CALLS = 20, 100
GROUPS = {
    "rtn-w4a16g128": ("w4a16g128", False, False),
    "rtn-w4a8": ("w4a8", False, False),
    "qe-w4a16g128": ("w4a16g128", True, False),
    "qe-w4a8": ("w4a8", True, False),
    "qe-paper-w4a8": ("w4a8", True, True),
}
"""Scheme, whether there is a shared adapter, and whether there are routed experts."""


def measured(code: Path, tokens: int) -> dict[str, float]:
    """Microseconds by group, in this process, where kernels and runtime are those of `code`."""
    sys.path[:0] = [str(code), str(code / "kernels"), str(ROOT)]
    import torch

    sys.modules.pop("tests", None)
    from qe_dist.core.quantized import Factor, GroupInput
    from qe_dist.core.scheme import Scheme
    from qe_dist.serve import on_kernels
    from qe_dist.serve.group import Group
    from tests.kernels.fake_gpu import fake_gpu

    on_kernels.order_for = lambda device: on_kernels.ops.Order.WGMMA

    def factor(*shape: int) -> Factor:
        return Factor(torch.ones(*shape[:-1], shape[-1] // 2, dtype=torch.uint8), torch.ones(shape[:-1]).bfloat16())

    found = {}
    with fake_gpu(), torch.inference_mode():
        for name, (scheme_name, shared, routed) in GROUPS.items():
            scheme, x = Scheme.parse(scheme_name), torch.zeros(tokens, COLUMNS, dtype=torch.bfloat16)
            part = GroupInput(
                shared_down=factor(RANK, COLUMNS) if shared else None,
                expert_down=factor(EXPERTS, RANK, COLUMNS) if routed else None,
                router=torch.ones(EXPERTS, COLUMNS) if routed else None,
            )
            repair = {"shared_up": factor(ROWS, RANK)} if shared else {}
            repair |= {"expert_up": factor(EXPERTS, ROWS, RANK)} if routed else {}
            group = Group(on_kernels.Input(part, scheme, COLUMNS))
            if routed:
                group.choose_for(group, part.router)
            words = torch.zeros(ROWS, COLUMNS * scheme.weight_bits // 32, dtype=torch.int32)
            scale = torch.ones(ROWS, COLUMNS // (scheme.group_size or COLUMNS), dtype=torch.bfloat16)
            linear = on_kernels.Linear(words, scale, repair, scheme, COLUMNS)

            def call(group=group, linear=linear, x=x) -> None:
                linear(group.prepare(x), None, x.dtype)

            found[name] = 1e6 * min(seconds(call) for _ in range(ROUNDS))
    return found


def seconds(call) -> float:
    """Of one call, the mean over many; after some that compile and warm up."""
    for _ in range(10):
        call()
    start = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - start) / CALLS


def elsewhere(code: Path, tokens: int) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).resolve()), "--code", str(code), "--tokens", str(tokens), "--here"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--code", type=Path, action="append", default=[], help="another checkout, as it was before")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        print(json.dumps(measured(given.code[0].resolve(), given.tokens)))
        return
    codes = [ROOT, *given.code]
    best: dict[Path, dict[str, float]] = {}
    for _ in range(3):
        for code in codes:
            now = elsewhere(code, given.tokens)
            best[code] = {name: min(value, best.get(code, now)[name]) for name, value in now.items()}
    for name in GROUPS:
        print(f"{name:16}" + "".join(f"{best[code][name]:9.1f} us" for code in codes))
    sys.path[:0] = [str(ROOT / "pipelines")]
    from qe_pipelines.results import write_result

    rows = [
        {"group": name, "microseconds": best[ROOT][name]}
        | ({"before": best[codes[1]][name], "ratio": best[codes[1]][name] / best[ROOT][name]} if given.code else {})
        for name in GROUPS
    ]
    write_result(ROOT / "benchmarks" / "results" / "python_per_group.json", {"tokens": given.tokens, "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
