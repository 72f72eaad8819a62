"""The workers: plain classes of `qe_dist.flow` as Ray actors."""

import ray

from qe_dist.flow.calibrate import Embedder
from qe_dist.flow.stage import Stage

EmbedActor = ray.remote(Embedder)
StageActor = ray.remote(Stage)
