"""Checkpoints of any library: `load_checkpoint` reads one, `build` makes the training net of it."""

from repvgg_deploy.checkpoints.known_layouts import LAYOUTS
from repvgg_deploy.checkpoints.loading import Checkpoint, build, load_checkpoint

__all__ = ["LAYOUTS", "Checkpoint", "build", "load_checkpoint"]
