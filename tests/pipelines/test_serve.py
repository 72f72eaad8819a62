"""What `qe-dist serve` refuses before anything starts, each in one paragraph that names the option or file."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from qe_pipelines import main
from qe_pipelines.serve import how_to_ask
from safetensors.torch import load_file, save_file

from qe_dist.core.errors import ConfigError
from qe_dist.flow import local
from qe_dist.flow.config import RunConfig
from qe_dist.methods.recipes import load_recipe
from qe_dist.serve import vllm_plugin
from qe_dist.serve.http.endpoint import Endpoint
from tests.tiny import calibration, tiny_model

Serve = Callable[..., str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serve")
    data = calibration(root / "data")
    local.quantize(RunConfig(tiny_model(root / "model"), load_recipe("rtn-w4a8"), data, root / "made"))
    return root / "made"


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "made"))


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Serve:
    """What it prints to stderr, as it exits with 2. vLLM counts as installed."""
    monkeypatch.setattr(vllm_plugin, "check_installed", lambda: None)

    def call(checkpoint: Path, *options: str) -> str:
        monkeypatch.setattr("sys.argv", ["qe-dist", "serve", str(checkpoint), *options])
        with pytest.raises(SystemExit) as end:
            main.main()
        assert end.value.code == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    return call


def test_no_checkpoint(serve: Serve, tmp_path: Path) -> None:
    assert "has no config.json; give a finished checkpoint" in serve(tmp_path)


def test_a_model_that_is_not_quantized(serve: Serve, made: Path) -> None:
    assert "model has no qe_manifest.json" in serve(made.parent / "model")


def test_another_format(serve: Serve, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert "format version 99" in serve(checkpoint)


def test_a_missing_tensor(serve: Serve, checkpoint: Path) -> None:
    path = next(checkpoint.glob("block-*.safetensors"))
    tensors = load_file(path)
    lost = next(name for name in tensors if name.endswith("down_proj.weight_scale"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, path)
    assert f"{lost}: missing in {path.name}" in serve(checkpoint)


def test_a_truncated_file(serve: Serve, checkpoint: Path) -> None:
    path = next(checkpoint.glob("block-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    assert f"is damaged: {path.name}" in serve(checkpoint)


def test_a_tensor_parallel_size_that_does_not_divide(serve: Serve, checkpoint: Path) -> None:
    message = serve(checkpoint, "--tensor-parallel-size", "3")
    assert "--tensor-parallel-size 3" in message
    assert "do not divide over 3 ranks" in message


def test_a_word_too_many(serve: Serve, checkpoint: Path) -> None:
    assert "unexpected 'twice'; options of vLLM come behind --" in serve(checkpoint, "twice")


def test_local_is_one_replica(serve: Serve, checkpoint: Path) -> None:
    assert "leave out --cluster and --replicas" in serve(checkpoint, "--local", "--replicas", "2")


def test_a_port_that_is_taken(serve: Serve, checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port}: Address already in use" in serve(checkpoint, "--local", "--port", port)


def test_an_endpoint_that_all_may_reach_wants_a_key(serve: Serve, checkpoint: Path) -> None:
    message = serve(checkpoint, "--host", "0.0.0.0", "--local", "--replicas", "2")
    assert "--api-key asks for a key" in message


def test_vllm_is_looked_for_and_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_plugin, "packages_distributions", dict)
    with pytest.raises(ConfigError, match=r"vLLM is not installed; qe_dist serves with vLLM 0\.32"):
        vllm_plugin.check_installed()
    with pytest.raises(ConfigError, match=r"vLLM 0\.32, found 0\.29\.1"):
        vllm_plugin.check_supported("0.29.1")


def test_the_command_that_is_printed_has_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    _, curl = how_to_ask(Endpoint("/models/made"), "0.0.0.0", 8000, "sesame")
    assert curl.startswith('curl http://127.0.0.1:8000/v1/chat/completions -H "Authorization: Bearer $VLLM_API_KEY"')
    assert "sesame" not in curl
    assert '"model": "made"' in curl
