"""Suite files: what they expand to, what is refused, and those that the project brings."""

from __future__ import annotations

from pathlib import Path

import pytest

from repvgg_deploy.benchmark.suites import load_suite
from repvgg_deploy.errors import DeployError
from repvgg_deploy.nets.baselines import find_baseline
from repvgg_deploy.nets.cards import find_card

SUITES = sorted((Path(__file__).parents[2] / "bench" / "suites").glob("*.toml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "suite.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_every_suite_of_the_project_names_models_that_there_are(path: Path) -> None:
    request = load_suite(path)
    for group in request.groups:
        for case in group.all_cases():
            assert find_baseline(case.model) or find_card(case.model)


def test_there_are_suites() -> None:
    assert {path.stem for path in SUITES} >= {"cpu", "cpu_fused_vs_training", "paper", "gpu_torch", "gpu_tensorrt"}


def test_a_group_is_every_combination_side_by_side(tmp_path: Path) -> None:
    text = """
    [measure]
    min_rounds = 4
    [[group]]
    models = ["A0", "A1"]
    precisions = ["fp32", "int8"]
    forms = ["deploy"]
    batches = [1, 16]
    """
    request = load_suite(write(tmp_path, text))
    assert request.options.min_rounds == 4
    assert [group.batch for group in request.groups] == [1, 16]
    cases = [(case.model, case.precision) for case in request.groups[0].cases]
    assert cases == [("A0", "fp32"), ("A0", "int8"), ("A1", "fp32"), ("A1", "int8")]


def test_together_by_model_makes_a_group_a_model(tmp_path: Path) -> None:
    text = '[[group]]\nmodels = ["A0", "A1"]\nforms = ["training", "deploy"]\ntogether = "model"'
    groups = load_suite(write(tmp_path, text)).groups
    assert [{case.model for case in group.cases} for group in groups] == [{"A0"}, {"A1"}]
    assert len({group.key for group in groups}) == 2


def test_the_baseline_is_run_in_each_way_that_a_model_is(tmp_path: Path) -> None:
    text = '[[group]]\nmodels = ["A0", "A1"]\nprecisions = ["fp32", "int8"]\nbaseline = "resnet50"'
    (group,) = load_suite(write(tmp_path, text)).groups
    extra = group.all_cases()[len(group.cases) :]
    assert [(case.model, case.precision) for case in extra] == [("resnet50", "fp32"), ("resnet50", "int8")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no group"),
        ('[[group]]\nmodels = ["A0"]\nspeed = 1', "unknown key 'speed'"),
        ('[[group]]\nmodels = ["A0"]\nbackends = ["abacus"]', "abacus"),
        ('[[group]]\nmodels = ["A0"]\ntogether = "none"', "together"),
        ("[[group]]\nbatches = [1]", "no models"),
        ('[measure]\nseconds = 3\n[[group]]\nmodels = ["A0"]', "unknown key 'seconds'"),
        ("[[group", "cannot read"),
    ],
)
def test_a_wrong_suite_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=message):
        load_suite(write(tmp_path, text))


def test_a_missing_suite_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="cannot read"):
        load_suite(tmp_path / "none.toml")


def test_a_group_is_another_one_with_other_copies_streams_threads_or_baseline(tmp_path: Path) -> None:
    plain = '[[group]]\nmodels = ["A0"]\n'
    lines = ("", "transfers = true", "streams = 2", 'baseline = "resnet50"')
    texts = [*(plain + line for line in lines), "threads = 1\n" + plain]
    keys = [load_suite(write(tmp_path, text)).groups[0].key for text in texts]
    assert len(set(keys)) == len(keys)
