"""Checkpoints of any library: `load_checkpoint` reads one, `build` makes the training net of it."""

from repvgg_deploy.checkpoints.inert import Inert, attributes_of
from repvgg_deploy.checkpoints.known_layouts import LAYOUTS
from repvgg_deploy.checkpoints.loading import Checkpoint, CheckpointOptions, build, load_checkpoint

__all__ = ["LAYOUTS", "Checkpoint", "CheckpointOptions", "Inert", "attributes_of", "build", "load_checkpoint"]
