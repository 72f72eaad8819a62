"""Prints the command that serves a checkpoint by vLLM, as `qe-dist serve CHECKPOINT --local` runs it.

    python examples/serve.py CHECKPOINT [RANKS]

It starts nothing, so it needs neither vLLM nor a GPU. That vLLM answers so is tested by tests/vllm, on a CPU.
"""

import shlex
import sys

from qe_dist.serve.http.endpoint import Endpoint


def main(checkpoint: str, ranks: str = "1") -> None:
    endpoint = Endpoint(checkpoint, tensor_parallel_size=int(ranks), max_requests=64, options=("--max-model-len=8192",))
    for name, value in endpoint.environment().items():
        print(f"export {name}={shlex.quote(value)}")
    print(shlex.join(["vllm", "serve", checkpoint, *endpoint.vllm_options()]))


if __name__ == "__main__":
    main(*sys.argv[1:])
