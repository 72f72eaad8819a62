"""A run: what it was asked to do, and the directory in which it is done. The only owner of both."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from qe_dist.core.errors import ConfigError
from qe_dist.core.source import WeightSource
from qe_dist.core.spec import ModelSpec
from qe_dist.flow.config import POLICY, RunConfig, padded_alike
from qe_dist.io.checkpoint import assemble, put_passthrough
from qe_dist.io.lock import RunLock
from qe_dist.io.remote import Mirror
from qe_dist.io.run_dir import RunDir
from qe_dist.methods.recipe import Recipe
from qe_dist.methods.recipes import recipe_from

log = logging.getLogger("qe_dist")


@dataclass(frozen=True, eq=False)
class Run:
    """Nothing is written before `open`, for which the lock must be held."""

    config: RunConfig
    """What the user asked for, completed by the recipes of the blocks before `from_block`."""
    store: RunDir
    identity: Mapping[str, Any]
    """What must be equal for the directory to be continued."""
    left_out: tuple[str, ...] = ()
    """Calibration samples that are not used, each with the reason."""

    @property
    def recipe(self) -> Recipe:
        return self.config.recipe

    @cached_property
    def lock(self) -> RunLock:
        """Against other commands. ConfigError for a directory of others, when this is first asked for."""
        return self.store.lock()

    @cached_property
    def mirror(self) -> Mirror | None:
        """The copy behind a URL; None where none is asked for."""
        return None if self.config.mirror is None else Mirror(self.config.mirror, self.store)

    def open(self) -> None:
        """Makes or continues the directory. ConfigError where it is another run's. Finished files that are damaged are
        forgotten, with a warning."""
        store = self.store
        if self.mirror is not None:
            self.mirror.restore(self.identity, self.config.resume)
        if self.config.from_block:
            store.change(self.identity, POLICY, self.config.from_block)
        if store.open(self.identity, self.config.resume) and not store.is_complete:
            for fault in store.check_files():
                log.warning("%s; it is made anew", fault)
        if store.is_complete:
            store.clean()

    def start(self, model: ModelSpec, source: WeightSource) -> None:
        """Writes what is taken over unchanged."""
        put_passthrough(self.store, model, source)

    def finish(self, model: ModelSpec, source: WeightSource) -> None:
        """Puts the checkpoint together, and drops what only a continuation would need."""
        assemble(self.store, model, source, self.recipe.describe(), self.identity, self.left_out)
        self.store.clean()


def with_policy(config: RunConfig, store: RunDir) -> RunConfig:
    """The config with the recipes of the blocks before `from_block`, as the run directory has them. ConfigError where
    it has none, or where the model would be another one from that block on."""
    if not config.from_block:
        return config
    before = store.identity()
    policy = [*before["earlier"], [before["from_block"], before["recipe"]]]
    earlier = tuple((first, recipe_from(content)) for first, content in policy if first < config.from_block)
    for _, recipe in earlier:
        for changed, same in (
            ("rotated", recipe.rotation == config.recipe.rotation),
            ("padded", padded_alike(config, recipe)),
        ):
            if not same:
                raise ConfigError(
                    f"from block {config.from_block} on the model would be {changed} differently; it is one model"
                )
    return replace(config, earlier=earlier)
