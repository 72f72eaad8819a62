"""Images for vLLM's server that come with the request, and from nowhere else.

Stock vLLM fetches any http:// URL that a client names, and answers 500 to a decompression bomb and to file:// URLs.
`VLLM_MEDIA_CONNECTOR=qe-inline` chooses this connector, which the plug-in registers.
"""

from typing import Any

from PIL.Image import DecompressionBombError
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

NAME = "qe-inline"


@MEDIA_CONNECTOR_REGISTRY.register(NAME)
class InlineMedia(MediaConnector):
    """Loads base64 `data:` URLs alone. VLLMValidationError, which clients get as 400, for all else."""

    def load_from_url(self, url: str, *args: Any, **kwargs: Any) -> Any:
        _check_inline(url)
        try:
            return super().load_from_url(url, *args, **kwargs)
        except DecompressionBombError as error:
            raise VLLMValidationError(str(error)) from None

    async def load_from_url_async(self, url: str, *args: Any, **kwargs: Any) -> Any:
        _check_inline(url)
        try:
            return await super().load_from_url_async(url, *args, **kwargs)
        except DecompressionBombError as error:
            raise VLLMValidationError(str(error)) from None


def _check_inline(url: str) -> None:
    head = url[:64].partition(",")[0].lower()
    if not (head.startswith("data:") and head.endswith(";base64")):
        raise VLLMValidationError(
            "images must come with the request, as data:image/png;base64,... or another type; none is fetched"
        )
