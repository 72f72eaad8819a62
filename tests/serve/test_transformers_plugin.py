"""What transformers sees of us."""

import subprocess
import sys

import pytest

from qe_dist.core.errors import CheckpointError


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(
    "order", ["import qe_dist; import transformers", "import transformers.quantizers.auto; import qe_dist"]
)
def test_importing_qe_dist_registers_the_quantizer_in_either_order(order):
    code = f"{order}; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; print(m['qe'].__name__)"
    assert run(code) == "QEQuantizer"


def test_importing_qe_dist_imports_neither_transformers_nor_torch_twice():
    assert run("import sys, qe_dist; print('transformers' in sys.modules)") == "False"


def test_registering_twice_is_harmless():
    from qe_dist.serve import transformers_plugin

    transformers_plugin.register()
    transformers_plugin.register()


def test_another_format_is_refused():
    from qe_dist.serve.transformers_plugin import QEConfig

    with pytest.raises(CheckpointError, match=r"format version 1, which qe_dist 0.1 wrote; .* reads 2 and 3; quantize"):
        QEConfig([], [], version=1)


def test_config_survives_the_round_trip():
    from qe_dist.serve.transformers_plugin import QEConfig

    config = QEConfig([{"self_attn.qkv": {}}], [0, 0])
    again = QEConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.quant_method == "qe"
