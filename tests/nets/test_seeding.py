"""Inputs with a seed."""

from __future__ import annotations

import numpy as np
import pytest

from repvgg_deploy.errors import DeployError
from repvgg_deploy.nets.seeding import seeded_inputs


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_a_batch_that_memory_cannot_hold_is_an_error(dtype: type) -> None:
    with pytest.raises(DeployError, match=r"a batch of 100000000x3x224x224 needs .* GiB") as raised:
        seeded_inputs((10**8, 3, 224, 224), dtype)
    assert "smaller" in raised.value.hint


def test_inputs_are_the_same_each_time() -> None:
    assert (seeded_inputs((2, 3, 4, 4)) == seeded_inputs((2, 3, 4, 4))).all()
    assert seeded_inputs((2, 4, 4, 3), np.uint8).dtype == np.uint8
