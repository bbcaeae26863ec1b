"""`fuse` as a command: a checkpoint in, its deploy form as a checkpoint for the official code or timm out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from repvgg_deploy.artifacts import Parity, PreprocessingOptions
from repvgg_deploy.checkpoints import CheckpointOptions, build, load_checkpoint
from repvgg_deploy.checkpoints.writing import describe_in_metadata, name_state_dict, write_state_dict
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.staging import stage_files
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.images.decoding import normalize
from repvgg_deploy.nets.cost import count_parameters
from repvgg_deploy.nets.preprocessing import choose_preprocessing
from repvgg_deploy.nets.settings import StructureOptions
from repvgg_deploy.verification.inputs import choose_small_pixels
from repvgg_deploy.verification.parity import MAX_RELATIVE, compare_outputs, require_parity
from repvgg_deploy.verification.reference import run_fused, run_in_float64


@dataclass(frozen=True)
class FusedFile:
    """A deploy-form checkpoint that was written, and how it compares with the training form."""

    path: Path
    arch: str
    layout: str
    parameters: int
    parity: Parity


def write_fused(
    source: Path,
    target: Path,
    layout: str | None = None,
    options: CheckpointOptions | None = None,
) -> FusedFile:
    """Write the deploy form of the checkpoint `source` to `target`, float32, and verify what was written.

    Args:
        source: a checkpoint of any layout and form.
        target: `.safetensors`, or any other ending for a torch file.
        layout: `official` or `timm`; by default timm for a checkpoint from timm, else official.
        options: how `source` is read.

    Raises:
        DeployError: any error that the user can fix; `target` is not touched then.
    """
    if target.is_dir():
        raise DeployError(f"{target} is a directory", "give the name of the file to write: -o fused.pth")
    if target.exists() and source.exists() and target.samefile(source):
        raise DeployError(f"{target} is the checkpoint itself, whose branches would be lost", "give another name: -o")
    if target.suffix not in (".pth", ".pt", ".safetensors"):
        raise DeployError(f"{target} has no file extension of a checkpoint", "-o FILE.pth or FILE.safetensors")
    checkpoint = (options or CheckpointOptions()).load(source)
    chosen = layout or ("timm" if checkpoint.layout == "timm" else "official")
    net = build(checkpoint)
    fused = fuse(net, torch.float32)
    preprocessing = choose_preprocessing(checkpoint.spec, PreprocessingOptions(), checkpoint.settings)
    images = normalize(choose_small_pixels(checkpoint.spec, preprocessing), preprocessing)
    reference = run_in_float64(net, images)
    with stage_files(target.absolute().parent) as staging:
        written = staging / target.name
        state = name_state_dict(fused, chosen)
        write_state_dict(state, written, describe_in_metadata(checkpoint))
        # Verify what a reader gets from the file, not what was handed to the writer.
        spec = checkpoint.spec
        same = StructureOptions(spec.strides, str(spec.activation), spec.bn_eps)
        again = build(load_checkpoint(written, structure=same))
        parity = compare_outputs(reference, run_fused(again, images)[0][0])
        require_parity("the written file", parity, MAX_RELATIVE["stage"]["fp32"])
        del again
    return FusedFile(target, checkpoint.arch, chosen, count_parameters(fused.spec), parity)
