"""Types of numbers are torch's, and bfloat16 is widened exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from repvgg_deploy.checkpoints.number_types import NUMBER_TYPES, widen_bfloat16


@pytest.mark.parametrize("name", NUMBER_TYPES)
def test_a_type_has_the_name_and_the_size_of_torch(name: str) -> None:
    number_type, dtype = NUMBER_TYPES[name], getattr(torch, name)
    assert number_type.name == name
    assert number_type.itemsize == dtype.itemsize
    assert number_type.is_float == (dtype.is_floating_point and not name.startswith("float8"))


def test_every_bfloat16_becomes_the_same_float32_as_in_torch() -> None:
    raw = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16).float()
    # By their bits: NaNs too.
    assert np.array_equal(widen_bfloat16(raw).view(np.uint32), expected.numpy().view(np.uint32))
