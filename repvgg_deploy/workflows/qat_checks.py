"""What `qat` can know before any work: whether the checkpoint can be trained, and its result be written."""

from __future__ import annotations

import os

import torch

from repvgg_deploy.checkpoints import Checkpoint
from repvgg_deploy.checkpoints.writing import name_state_dict
from repvgg_deploy.errors import CheckpointError, DeployError
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.workflows.qat_request import QatRequest, curves_path, scales_path, state_path


def load_trainable(request: QatRequest) -> Checkpoint:
    """The checkpoint of a request; all that can be known before any work was found to be in order.

    Raises:
        DeployError: the checkpoint cannot be read, or not be trained, or its result could not be written.
    """
    _require_places(request)
    _require_shares(request)
    if request.output.suffix not in (".pth", ".pt", ".safetensors"):
        raise DeployError(f"{request.output} has no file extension of a checkpoint", "-o FILE.safetensors or FILE.pth")
    if request.device == "cuda" and not torch.cuda.is_available():
        raise DeployError("torch sees no CUDA GPU here", "leave out --device, or install torch for CUDA")
    options = request.options
    if options.weight_bits != 8 or options.activation_bits != 8:
        raise DeployError("an INT8 graph has 8 bits", "other widths are for prepare_qat(), in Python")
    checkpoint = request.read.load(request.checkpoint)
    if not checkpoint.spec.classes:
        raise DeployError(
            f"{request.checkpoint} is a backbone", "qat trains classifiers; prepare_qat() takes any module"
        )
    if checkpoint.form == "deploy" and not request.from_deploy:
        raise DeployError(
            f"{request.checkpoint} is in deploy form: it has no branches to train",
            "give the training form, or --from-deploy, which inserts BNs, trains and fuses again",
        )
    if checkpoint.form == "train" and request.from_deploy:
        raise DeployError(f"{request.checkpoint} is in training form", "leave out --from-deploy")
    _require_names(checkpoint)
    return checkpoint


def layout_to_write(checkpoint: Checkpoint) -> str:
    """Whose names the trained checkpoint gets: those that the official layout has no place for keep their own."""
    own = ("timm", "holocron") if checkpoint.form == "deploy" else ("timm", "holocron", "repoptimizers")
    return checkpoint.layout if checkpoint.layout in own else "official"


def _require_places(request: QatRequest) -> None:
    """Raise DeployError if one of the files cannot be written, as far as that can be seen."""
    output = request.output
    for path in (output, scales_path(output), curves_path(output), state_path(output)):
        try:
            is_folder = path.is_dir()
            # Folders that are still to be made may lead back to it.
            is_source = os.path.realpath(path) == os.path.realpath(request.checkpoint) or (
                path.exists() and request.checkpoint.exists() and path.samefile(request.checkpoint)
            )
        except OSError as error:
            raise DeployError(f"{path} cannot be written: {error.strerror}", "choose another -o") from error
        if is_folder:
            raise DeployError(f"{path} is a directory, so no file can take its place", "choose another -o")
        if is_source:
            raise DeployError(f"{path} is the checkpoint itself", "give another name: -o")


def _require_shares(request: QatRequest) -> None:
    """Raise DeployError if a process of torchrun would get no image of a batch."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if request.training.batch < processes:
        raise DeployError(
            f"a batch of {request.training.batch} is too small for {processes} processes",
            f"--batch {processes} or more",
        )


def _require_names(checkpoint: Checkpoint) -> None:
    """Raise DeployError if no layout has names for all parts of the net: the result could not be written."""
    with torch.device("meta"):
        net = RepVGG(checkpoint.spec)
    try:
        name_state_dict(net, layout_to_write(checkpoint))
    except CheckpointError as error:
        raise DeployError(
            f"{checkpoint.path} cannot be trained, as the result could not be written: {error.message}",
            "export --int8 needs no layout; prepare_qat(), in Python, takes any module",
        ) from error
