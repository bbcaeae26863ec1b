"""The saved run of `qat`: read as it was written, and never trusted."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.damage import UNREADABLE, places, replaced, truncated, without, wrong_for
from helpers.evil_pickles import KINDS, make_evil_pickle, works
from helpers.small_nets import make_net

from repvgg_deploy.errors import DeployError
from repvgg_deploy.quantization.qat import QatOptions
from repvgg_deploy.quantization.qat_best import BestSoFar
from repvgg_deploy.quantization.qat_start import empty_start
from repvgg_deploy.quantization.qat_training import QatTraining, TrainingOptions
from repvgg_deploy.workflows.qat_state import SavedRun, load_run, save_run

pytestmark = pytest.mark.slow

IDENTITY = "5" * 64
ROWS = (
    {"step": 0, "held_out_agreement": 50.0, "held_out_divergence": 0.25},
    {"step": 1, "loss": 0.5, "agreement": 50.0, "held_out_agreement": 50.0, "held_out_divergence": math.inf},
)
LIMITS = (-torch.ones(3, 1, 1), torch.ones(3, 1, 1))


def begin() -> QatTraining:
    """A run whose values are any, but finite."""
    start = empty_start(make_net(), QatOptions())
    with torch.no_grad():
        for net in (start.student, start.teacher):
            for value in net.state_dict().values():
                value.fill_(0.05 if value.is_floating_point() else 1)
    return QatTraining(start.student, start.teacher, TrainingOptions(steps=4, batch=2))


@pytest.fixture(scope="module")
def run() -> QatTraining:
    training = begin()
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    training.step(lambda indices: (images[indices], None), 4, LIMITS)
    return training


@pytest.fixture(scope="module")
def content(run: QatTraining) -> bytes:
    file = io.BytesIO()
    best = BestSoFar(0, 0.25, run.student.state_dict())
    save_run(SavedRun(IDENTITY, ROWS, run.state(), run.teacher.net.state_dict(), best), file)
    return file.getvalue()


@pytest.fixture(scope="module")
def fresh() -> QatTraining:
    return begin()


@pytest.fixture
def load(tmp_path: Path, fresh: QatTraining) -> Callable[[bytes], SavedRun]:
    def read(content: bytes) -> SavedRun:
        path = tmp_path / "net.qat-state.pt"
        path.write_bytes(content)
        return load_run(path, IDENTITY, fresh)

    return read


def save_tree(tree: Any) -> bytes:
    file = io.BytesIO()
    torch.save(tree, file)
    return file.getvalue()


def test_the_run_that_is_read_is_the_one_that_was_saved(run, content, load) -> None:
    saved = load(content)
    assert saved.rows[0] == ROWS[0]
    assert math.isnan(saved.rows[1]["held_out_divergence"])
    assert (saved.training.done, len(saved.training.rates)) == (1, len(run.optimizer.param_groups))
    assert (saved.best.step, saved.best.cost) == (0, 0.25)
    assert all(torch.equal(value, run.student.state_dict()[name]) for name, value in saved.best.student.items())
    expected = run.state().tensors
    assert set(saved.training.tensors) == set(expected)
    assert any(name.startswith("optimizer.") for name in expected)
    assert all(torch.equal(value, expected[name]) for name, value in saved.training.tensors.items())
    again = begin()
    again.restore(saved.training)
    assert all(torch.equal(value, expected[name]) for name, value in again.state().tensors.items())


@pytest.mark.parametrize("kind", KINDS)
def test_no_code_in_a_saved_run_is_run(content, load, tmp_path: Path, kind: str) -> None:
    evil = make_evil_pickle(kind, tmp_path / "made")
    assert works(evil, tmp_path / "made")
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            new.writestr(name, evil if name.endswith("data.pkl") else old.read(name))
    for hostile in (changed.getvalue(), evil, pickle.dumps({"about": 1})):
        with pytest.raises(DeployError, match="is not the saved state of a run"):
            load(hostile)
    assert not (tmp_path / "made").exists()


def test_damaged_file_is_one_error(content, load) -> None:
    for damaged in (*truncated(content, 6), *UNREADABLE):
        with pytest.raises(DeployError, match="is not the saved state of a run"):
            load(damaged)


def test_flipped_bit_in_a_tensor_is_noticed(content, load) -> None:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        infos = [info for info in archive.infolist() if "/data/" in info.filename]
    for info in infos[:: len(infos) // 5]:
        changed = bytearray(content)
        (padding,) = struct.unpack_from("<H", content, info.header_offset + 28)
        changed[info.header_offset + 30 + len(info.filename) + padding + info.compress_size // 2] ^= 4
        with pytest.raises(DeployError, match="is not the saved state of a run"):
            load(bytes(changed))


def test_what_is_said_of_a_run_is_held_to_types_and_bounds(content, load) -> None:
    about = json.loads(torch.load(io.BytesIO(content), weights_only=True)["about"])

    def refusal(changed: Any) -> str:
        # Without tensors it is quick, and the next thing that is wrong with it is known.
        with pytest.raises(DeployError) as raised:
            load(save_tree({"about": json.dumps(changed), "training": {}, "teacher": {}, "best": {}}))
        return raised.value.message

    assert "student." in refusal(about)
    for place in places({name: value for name, value in about.items() if name != "version"}):
        value: Any = about
        for key in place:
            value = value[key]
        # These may be no number, which JSON says with null.
        nullable = place[-1] in {"best_cost", "held_out_divergence"}
        wrongs = [wrong for wrong in wrong_for(value) if wrong is not None or not nullable]
        for changed in (without(about, place), *(replaced(about, place, wrong) for wrong in wrongs)):
            assert "student." not in refusal(changed), changed
    for key, wrong in (("done", 5), ("rates", []), ("identity", "6" * 64), ("version", 1), ("best_step", 2)):
        assert "student." not in refusal({**about, key: wrong})
    first, second = about["rows"]
    for rows in ([first, {**second, "step": 0.5}], [{**first, "step": 1}, second], [first, {**second, "step": 2}]):
        assert "its curves have other steps" in refusal({**about, "rows": rows})
    tree = torch.load(io.BytesIO(content), weights_only=True)
    with pytest.raises(DeployError, match="are not those of step 2"):
        load(save_tree({**tree, "about": json.dumps({**about, "done": 2})}))


def test_tensors_are_those_of_the_run(content, load) -> None:
    tree = torch.load(io.BytesIO(content), weights_only=True)
    tensors = tree["training"]
    name = next(key for key, value in tensors.items() if value.dim() == 4)
    good = tensors[name]
    moment = next(key for key in tensors if key.endswith("exp_avg_sq"))
    others: list[dict[str, Any]] = [
        {**tensors, name: good.double()},
        {**tensors, name: good[:1]},
        {**tensors, name: good * float("nan")},
        {**tensors, name: torch.zeros((), dtype=good.dtype).expand(1 << 20, 1 << 10, 3, 3)},
        {**tensors, name: torch.empty(good.shape, device="meta")},
        {**tensors, name: good.to_sparse()},
        {**tensors, name: "text"},
        {**tensors, "student.other": good},
        {key: value for key, value in tensors.items() if key != name},
        {key: value for key, value in tensors.items() if key != moment},
        {**tensors, moment: tensors[moment] - 1e9},
    ]
    for wrong in others:
        with pytest.raises(DeployError, match="is not the saved state of a run"):
            load(save_tree({**tree, "training": wrong}))
    for wrong_tree in ([], {"about": "{}"}, {**tree, "teacher": tensors}, {**tree, "training": [good]}):
        with pytest.raises(DeployError):
            load(save_tree(wrong_tree))


def test_numbers_that_share_one_place_in_the_file_do_not_in_memory(content, load) -> None:
    tree = torch.load(io.BytesIO(content), weights_only=True)
    name = next(key for key, value in tree["training"].items() if key.endswith("exp_avg") and value.dim() == 4)
    shared = torch.zeros(()).expand(tree["training"][name].shape)
    loaded = load(save_tree({**tree, "training": {**tree["training"], name: shared}})).training.tensors[name]
    loaded.add_(1)
    assert bool((loaded == 1).all())


def test_pipe_in_its_place_is_refused_at_once(tmp_path: Path, fresh: QatTraining) -> None:
    path = tmp_path / "net.qat-state.pt"
    os.mkfifo(path)
    with pytest.raises(DeployError, match="is a pipe or a device"):
        load_run(path, IDENTITY, fresh)


def test_full_disk_is_an_error_of_the_system(run: QatTraining) -> None:
    saved = SavedRun(IDENTITY, ROWS, run.state(), {}, BestSoFar(0, 0.25, {}))
    with Path("/dev/full").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        save_run(saved, file)
