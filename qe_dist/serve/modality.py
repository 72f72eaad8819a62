"""The modality of the tokens that a model is working on, for the groups that treat text and images differently.

Only the call of the whole model sees token ids; its blocks see hidden states. Hooks on the model keep the modality
while the call runs. Right in `generate` too: every decoding step is a call with the ids of its own tokens.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qe_dist.core.batch import IMAGE, TEXT
from qe_dist.core.errors import ConfigError


class TokenModality:
    """image_ids: tokens that stand for parts of images. argument: that of the model which tells the modality of every
    token (not 0 for images), for calls without ids."""

    def __init__(self, image_ids: Sequence[int] = (), argument: str | None = None) -> None:
        self.image_ids, self.argument = image_ids, argument
        self._current: Tensor | None = None

    def follow(self, model: nn.Module) -> None:
        """Listens to the calls of this model."""
        model.register_forward_pre_hook(self._enter, with_kwargs=True)
        model.register_forward_hook(self._leave, always_call=True)

    def of(self, rows: Tensor) -> Tensor:
        """The modality of every row [T] of a tensor that holds all tokens of the running call."""
        if self._current is None:
            raise ConfigError(
                "this checkpoint treats text and image tokens differently, so its blocks run only inside the model"
            )
        if self._current.numel() != len(rows):
            raise ConfigError(
                f"input_ids or {self.argument} tell of {self._current.numel()} tokens, the model works on {len(rows)}"
            )
        return self._current.flatten().to(rows.device)

    @contextmanager
    def during(self, modality: Tensor) -> Iterator[None]:
        """While a block runs by itself on tokens of this modality; padding counts as text."""
        self._current = modality.clamp(min=TEXT)
        try:
            yield
        finally:
            self._current = None

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        given = given | given.get("kwargs", {})
        self._current = self._told_by(given.get("input_ids"), given.get(self.argument))

    def _leave(self, *_: Any) -> None:
        self._current = None

    def _told_by(self, input_ids: Tensor | None, type_ids: Tensor | None) -> Tensor:
        if input_ids is not None and self.image_ids:
            image = torch.stack([input_ids == token for token in self.image_ids]).any(dim=0)
        elif type_ids is not None:
            image = type_ids != 0
        else:
            raise ConfigError(
                "this checkpoint treats text and image tokens differently: call the model with input_ids, "
                f"or with {self.argument} beside inputs_embeds"
            )
        return torch.where(image, IMAGE, TEXT).to(torch.int8)
