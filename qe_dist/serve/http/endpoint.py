"""What an OpenAI-compatible endpoint serves and allows, said once for plain vLLM and for Ray Serve. Needs neither."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Endpoint:
    """A checkpoint and its limits."""

    checkpoint: str
    tensor_parallel_size: int = 1
    replicas: int = 1
    max_requests: int = 256
    """Requests that each replica runs or lets wait; those beyond get 503."""
    max_images: int = 4
    """Images of one request at most."""
    drain_seconds: int = 300
    """How long running requests have to end when the endpoint stops."""
    device: Literal["cuda", "cpu"] = "cuda"
    """What Ray has to find for each rank of a replica: a GPU, or a CPU slot."""
    served_model_name: str | None = None
    """The name that requests ask for; without one, that of the checkpoint's folder."""
    options: Sequence[str] = ()
    """More options of vLLM, as on its command line; they win over ours."""

    @property
    def name(self) -> str:
        """The name of the model in requests."""
        return self.served_model_name or Path(self.checkpoint).name

    def vllm_options(self) -> list[str]:
        """The options of `vllm serve CHECKPOINT` for one replica, as on its command line."""
        return [
            f"--served-model-name={self.name}",
            f"--tensor-parallel-size={self.tensor_parallel_size}",
            f"--max-num-queued-reqs={self.max_requests}",
            f"--limit-mm-per-prompt={json.dumps({'image': self.max_images, 'video': 0})}",
            f"--shutdown-timeout={self.drain_seconds}",
            "--middleware=qe_dist.serve.http.vllm_gate.Gate",
            "--disable-fastapi-docs",
            *self.options,
        ]

    def environment(self) -> dict[str, str]:
        """Variables that vLLM reads beside its options. Whoever has set them otherwise knows why."""
        return {
            "VLLM_MEDIA_CONNECTOR": "qe-inline",  # images come with the request: no URL is fetched
            "VLLM_MAX_IMAGE_PIXELS": str(2**25),  # 100 MB as RGB
            "VLLM_MAX_N_SEQUENCES": "16",  # answers to one request; 16384 else
            "VLLM_MAX_COMPLETION_PROMPTS": "16",  # of one request; 1024 else
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",  # seconds; after 5 else, just when clients give up a connection, too
            "VLLM_NO_USAGE_STATS": "1",
        }
