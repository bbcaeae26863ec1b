"""How many calibration images really differ: scales that fit one scene fit no other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg_deploy.quantization.points import Images, rebatch

_SIDE = 8
# Between two images, as a share of the contrast within them. Copies of a photograph with noise of 20 of 255 grey levels
# are at 0.12, two photographs of one class, nearest neighbours among 20, at 0.38 or more.
_NEARLY_IDENTICAL = 0.25


def count_distinct(images: Images, most: int) -> int:
    """How many of the images (N, C, H, W) differ from all before them by more than noise; counted up to `most`.

    Two are compared by their thumbnails, up to a change that is small beside the contrast within them. So what scale
    and mean the pixels have makes no difference.
    """
    found = torch.empty(0)
    for batch in rebatch(images, torch.device("cpu")):
        for thumbnail in F.adaptive_avg_pool2d(batch, _SIDE).flatten(1):
            if not len(found) or not _is_near(thumbnail, found):
                found = torch.cat([found.reshape(-1, len(thumbnail)), thumbnail[None]])
            if len(found) >= most:
                return most
    return len(found)


def _is_near(thumbnail: Tensor, others: Tensor) -> bool:
    """Whether one of `others` (n, values) differs from `thumbnail` (values) by noise only."""
    contrast = (others.var(1, correction=0) + thumbnail.var(correction=0)) / 2
    distance = (others - thumbnail).square().mean(1)
    return bool((distance <= _NEARLY_IDENTICAL**2 * contrast).any())
