"""Quantization points, and batches of images on the way to them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repvgg_deploy.quantization.points import rebatch


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 8))
def test_rebatching_keeps_all_images_in_order(sizes: list[int], wanted: int) -> None:
    images = torch.arange(sum(sizes), dtype=torch.float32).reshape(-1, 1, 1, 1)
    out = list(rebatch(images.split(sizes), torch.device("cpu"), wanted))
    assert torch.equal(torch.cat(out), images)
    assert all(len(batch) == wanted for batch in out[:-1])
