"""Commands, called in this process."""

import pytest
from qe_pipelines import main


@pytest.fixture
def verify(monkeypatch, capsys):
    """verify(*words): exit code, output and errors of `qe-dist verify`."""

    def call(*words):
        monkeypatch.setattr("sys.argv", ["qe-dist", "verify", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main.main()
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return call
