"""The line of a finished block."""

import pytest
from qe_pipelines.progress import block_line, tuning_note

TUNING = {"steps": 50, "step": 45, "loss": 0.416, "error": 0.1, "nonfinite": [], "kept": "tuned"}
REPORT = {"index": 3, "seconds": 12.34, "groups": {"mlp.down": {"error": 0.01}}, "fallbacks": {}}


@pytest.mark.parametrize(
    ("tuning", "said"),
    [
        (TUNING, "tuned in 45 steps to 0.42 of its loss"),
        (TUNING | {"nonfinite": [3, 9]}, "tuned in 45 steps to 0.42 of its loss, 2 steps not finite"),
        (TUNING | {"kept": "closed form", "step": 0}, "not tuned: no step beat the closed form"),
    ],
)
def test_a_block_says_what_tuning_did(tuning, said):
    assert tuning_note(tuning) == said
    plain = "block   3    12.3 s  error  down 0.0100"
    assert block_line(REPORT) == plain
    assert block_line(REPORT | {"tuning": tuning}) == f"{plain}  {said}"
