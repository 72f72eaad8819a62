"""What Prometheus reads from a node while a run tells its events."""

import time
import urllib.request
from collections.abc import Callable

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from qe_cluster.launch import ray_cluster
from qe_cluster.metrics import MIB, Metrics

pytestmark = [pytest.mark.ray, pytest.mark.nightly]
SECONDS = 60
"""To wait for Ray's agent; it takes a few."""
KEPT = 2.0
"""Seconds that Ray keeps a gauge: two reports, of at least a second each."""


@pytest.fixture(scope="module")
def node():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        patch.setattr("qe_cluster.metrics.REFRESH_SECONDS", 0.5)
        with ray_cluster(None, 1):
            yield ray.nodes()[0]


def read(node, until: Callable[[dict], bool]) -> dict[tuple[str, ...], float]:
    """Our metrics on the node's page by name and by our own tags, as soon as `until` is true of them."""
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    ours = ("worker", "node", "part", "le")
    deadline = time.monotonic() + SECONDS
    found: dict[tuple[str, ...], float] = {}
    while not until(found):
        assert time.monotonic() < deadline, f"not what it should be within {SECONDS} s: {found}"
        time.sleep(0.2)
        try:
            text = urllib.request.urlopen(url, timeout=5).read().decode()
        except OSError:  # not up yet
            continue
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        found = {
            (s.name.removeprefix("ray_qe_"), *(s.labels[key] for key in ours if key in s.labels)): s.value
            for s in samples
            if s.name.startswith("ray_qe_")
        }
    return found


def tell(metrics, **data):
    usage = {"load": 0.0, "forward": 0.0, "fit": 0.0, "memory_mib": 1.0, "peak_mib": 2.0}
    metrics("worker", {"worker": 1, "node": "b", **usage, **data})


def test_prometheus_reads_them_from_the_node(node):
    with Metrics() as metrics:
        metrics("start", {"blocks": 8, "done": 3})
        metrics("wave", {"number": 1})
        tell(metrics, load=1.5)
        tell(metrics, load=1.5, forward=2.0, memory_mib=100.0, peak_mib=200.0)
        tell(metrics, load=2.0, forward=2.0, memory_mib=100.0, peak_mib=200.0)
        for tokens in (300, 41):
            metrics("batch", {"tokens": tokens})
        metrics("block", {"seconds": 2.5})
        metrics("moon", {"phase": "full"})
        metrics("done", {})
        found = read(node, lambda found: ("worker_seconds_total", "1", "b", "forward") in found)
    assert found[("tokens_total",)] == 341
    assert found[("blocks",)] == 8
    assert found[("blocks_done",)] == 4
    assert found[("waves_total",)] == 1
    assert found[("worker_memory_bytes", "1", "b")] == 100 * MIB
    assert found[("worker_peak_memory_bytes", "1", "b")] == 200 * MIB
    assert found[("worker_seconds_total", "1", "b", "load")] == 2.0
    assert found[("worker_seconds_total", "1", "b", "forward")] == 2.0
    assert found[("block_fit_seconds_count",)] == 1
    assert (found[("block_fit_seconds_bucket", "1.0")], found[("block_fit_seconds_bucket", "3.0")]) == (0, 1)


def test_gauges_stay_as_long_as_the_run_and_the_worker(node):
    """Ray forgets one that was not set for two reports."""
    memory = ("worker_memory_bytes", "1", "b")
    with Metrics() as metrics:
        metrics("start", {"blocks": 5, "done": 0})
        tell(metrics, fit=5.0)
        read(node, lambda found: memory in found)
        time.sleep(2 * KEPT)
        assert {memory, ("blocks",)} <= read(node, bool).keys()
        metrics("lost", {"worker": 1, "node": "b"})
        metrics("again", {"wave": 1})
        found = read(node, lambda found: found and memory not in found)
        tell(metrics, fit=1.0)  # who takes its place
        read(node, lambda found: found.get(("worker_seconds_total", "1", "b", "fit")) == 6.0)
        assert found[("blocks",)] == 5
        assert found[("workers_lost_total", "1", "b")] == 1
        assert found[("waves_again_total",)] == 1
    found = read(node, lambda found: found and ("blocks",) not in found)
    assert found[("waves_again_total",)] == 1


def test_a_second_run_of_the_same_process_counts_on(node):
    """As those of `qe-dist compare` do."""
    Metrics()("batch", {"tokens": 1})
    with Metrics() as metrics:
        metrics("start", {"blocks": 4, "done": 0})
        metrics("batch", {"tokens": 10_000})
        found = read(node, lambda found: found.get(("tokens_total",), 0) > 10_000)
    assert found[("blocks_done",)] == 0
