"""The driver ends when it is asked to, and when another command has its directory. Events need no cluster here."""

import threading

import pytest
from qe_cluster.watching import Monitor

from qe_dist.core.errors import QEError, Stopped


class Lease:
    """A lease that another command took over."""

    def check(self):
        raise QEError("taken over")


def monitor(lease=None):
    return Monitor(None, lease, threading.Event(), lambda *_: None)


def test_nothing_is_raised_before_the_caller_asks_to_stop():
    watched = monitor()
    watched.check_stop()
    assert not watched.stopping
    watched.stop.set()
    assert watched.stopping
    with pytest.raises(Stopped, match="type the same command again to continue"):
        watched.check_stop()


def test_a_directory_that_another_command_took_over_ends_the_call():
    with pytest.raises(QEError, match="taken over"):
        monitor(Lease()).check()
