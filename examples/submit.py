"""Runs a command of qe-dist as a job of a Ray cluster, follows its log, and ends with its exit code.

    python examples/submit.py http://HEAD:8265 quantize /shared/MODEL --recipe qe-w4a8 ...

Paths are those of the cluster. Tested against a Ray on this machine (tests/cluster/test_submit.py), not a real cluster.
"""

import sys

from qe_cluster.submit import connect, follow, submit


def main(address: str, *command: str) -> int:
    client = connect(address)
    job = submit(client, command)
    print(f"job {job}", flush=True)
    return follow(client, job, lambda text: print(text, end="", flush=True))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
