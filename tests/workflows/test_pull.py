"""`pull` from a real server on the loopback address: the cache, stopped downloads, checksums, and `--pretrained`."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from helpers.file_server import FileServer, serve_files

from repvgg_deploy.checkpoints import downloads
from repvgg_deploy.checkpoints.downloads import LocalFile, fetch_published, published_folder
from repvgg_deploy.checkpoints.published import PublishedFile, find_published, load_published
from repvgg_deploy.cli.main import main
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.places import data_folder
from repvgg_deploy.nets.cards import load_cards

CONTENT = random.Random(0).randbytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "repvgg-deploy" / "published"


@pytest.fixture
def server() -> Iterator[FileServer]:
    pytest.importorskip("pooch", reason="pooch, of the extra `pull`, is not installed")
    with serve_files({"/net.pth": CONTENT}) as served:
        yield served


@pytest.fixture
def file(server: FileServer) -> PublishedFile:
    return PublishedFile(
        source="loopback",
        arch="A0",
        url=f"{server.url}/net.pth",
        classes=5,
        input_size=224,
        resize=None,
        sha256=SHA256,
        bytes=len(CONTENT),
        file_name="net.pth",
    )


def names(folder: Path) -> list[str]:
    """The files of a cache, without the locks."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_a_file_is_fetched_once_and_taken_from_the_cache_without_a_server(
    file: PublishedFile, server: FileServer, own_cache: Path
) -> None:
    fetched = fetch_published(file)
    assert fetched == LocalFile(own_cache / "loopback" / "net.pth", SHA256, "sha256", was_cached=False)
    assert fetched.path.read_bytes() == CONTENT
    assert names(own_cache) == ["net.pth", "net.pth.sha256"]
    assert fetch_published(file, offline=True).was_cached
    assert len(server.requests) == 1


def test_offline_says_where_a_missing_file_belongs(file: PublishedFile, own_cache: Path) -> None:
    with pytest.raises(DeployError, match="is not in the cache") as raised:
        fetch_published(file, offline=True)
    place = own_cache / "loopback" / "net.pth"
    assert str(place) in raised.value.hint
    place.write_bytes(CONTENT)
    assert fetch_published(file, offline=True).path == place


def test_a_connection_that_breaks_is_taken_up_where_it_was(file: PublishedFile, server: FileServer) -> None:
    server.stop_after = [1_200_000, 1_000_000]
    assert fetch_published(file).sha256 == SHA256
    ranges = [wanted for _, wanted in server.requests]
    assert ranges[0] is None
    assert len(ranges) == 3
    starts = [int((wanted or "").removeprefix("bytes=").rstrip("-")) for wanted in ranges[1:]]
    assert 0 < starts[0] <= 1_200_000 < starts[1] <= 2_200_000


def test_a_run_that_ended_is_continued_by_the_next(
    file: PublishedFile, server: FileServer, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repvgg_deploy.checkpoints.downloads._ATTEMPTS", 1)
    server.stop_after = [2_000_000]
    with pytest.raises(DeployError, match="cannot download") as raised:
        fetch_published(file)
    assert raised.value.hint.startswith("run it again: it continues after ")
    assert names(own_cache) == ["net.pth.part", "net.pth.part.validator"]
    kept = (own_cache / "loopback" / "net.pth.part").stat().st_size
    assert fetch_published(file).sha256 == SHA256
    assert server.requests[-1] == ("/net.pth", f"bytes={kept}-")
    assert names(own_cache) == ["net.pth", "net.pth.sha256"]


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_file_that_changed_between_two_runs_is_fetched_from_the_start(
    has_ranges: bool, file: PublishedFile, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repvgg_deploy.checkpoints.downloads._ATTEMPTS", 1)
    server.stop_after, server.has_ranges = [2_000_000], has_ranges
    with pytest.raises(DeployError):
        fetch_published(replace(file, sha256="", bytes=0))
    other = random.Random(1).randbytes(2_500_000)
    server.files["/net.pth"] = other
    fetched = fetch_published(replace(file, sha256="", bytes=0))
    assert fetched.path.read_bytes() == other


@pytest.mark.parametrize(
    ("sha256", "size", "message"),
    [
        ("0" * 64, 0, f"its sha256 is {SHA256}, not 0000"),
        ("12345678", 0, "…; nothing was kept"),
        ("", 5, "gives more than the 5 bytes"),
        ("", 3_000_001, "it has 3,000,000 bytes, not 3,000,001"),
    ],
)
def test_a_wrong_checksum_keeps_nothing(
    sha256: str, size: int, message: str, file: PublishedFile, own_cache: Path
) -> None:
    with pytest.raises(DeployError, match="nothing was kept") as raised:
        fetch_published(replace(file, sha256=sha256, bytes=size))
    assert message in raised.value.message
    assert names(own_cache) == []


def test_a_cached_file_that_was_damaged_is_fetched_again(file: PublishedFile, server: FileServer) -> None:
    path = fetch_published(file).path
    path.write_bytes(CONTENT[:-1])
    fetched = fetch_published(file)
    assert (fetched.was_cached, path.read_bytes() == CONTENT, len(server.requests)) == (False, True, 2)


@pytest.mark.parametrize("is_known", [True, False])
def test_a_server_that_gives_more_than_the_file_is_not_listened_to(
    file: PublishedFile, own_cache: Path, monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    monkeypatch.setattr(downloads, "_MOST_BYTES", 1_000_000)
    smaller = replace(file, bytes=1_000_000) if is_known else replace(file, bytes=0, sha256="")
    with pytest.raises(DeployError, match="gives more than the 1,000,000 bytes"):
        fetch_published(smaller)
    assert names(own_cache) == []


def test_the_first_digits_of_a_sha256_are_enough(file: PublishedFile) -> None:
    fetched = fetch_published(replace(file, sha256=SHA256[:8]))
    assert (fetched.sha256, fetched.check) == (SHA256, "first digits of sha256")


def test_a_sha256_that_is_not_published_is_recorded_and_held_to(
    file: PublishedFile, server: FileServer, own_cache: Path
) -> None:
    unknown = replace(file, sha256="", bytes=0)
    assert fetch_published(unknown).check == "none"
    record = own_cache / "loopback" / "net.pth.sha256"
    assert record.read_text() == f"{SHA256}  net.pth\n"
    assert fetch_published(unknown).check == "recorded sha256"
    (own_cache / "loopback" / "net.pth").unlink()
    server.files["/net.pth"] = CONTENT + b"another"
    with pytest.raises(DeployError, match=f"not {SHA256}; nothing was kept"):
        fetch_published(unknown)


def test_a_server_without_the_file_and_none_at_all_are_errors(file: PublishedFile, own_cache: Path) -> None:
    with pytest.raises(DeployError, match="answers 404") as raised:
        fetch_published(replace(file, url=file.url + "x"))
    assert str(own_cache) in raised.value.hint
    with pytest.raises(DeployError, match=r"cannot download http://127\.0\.0\.1:9/"):
        fetch_published(replace(file, url="http://127.0.0.1:9/net.pth"))
    assert names(own_cache) == []


def test_without_pooch_the_error_says_what_to_install_and_where_the_file_belongs(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What Python does where a package is not installed.
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(DeployError, match="need the package pooch") as raised:
        fetch_published(find_published("timm/A0"))
    assert "repvgg-deploy[pull]" in raised.value.hint
    assert str(own_cache / "timm" / "repvgg_a0.rvgg_in1k.safetensors") in raised.value.hint


def test_every_published_file_is_of_a_known_architecture_and_has_its_own_name() -> None:
    files = load_published()
    assert {file.source for file in files} == {"openmmlab", "holocron", "timm"}
    known = {name.removeprefix("RepVGG-") for name in load_cards()}
    for file in files:
        assert file.arch in known
        assert file.url.startswith("https://")
        assert len(file.sha256) in (0, 8, 64)
        # The publishers end a file's name with the first digits.
        assert not file.sha256 or file.url.rpartition("-")[2].startswith(file.sha256[:8])
    assert len({(file.source, file.file_name) for file in files}) == len(files)


TABLE = """source = "x"
classes = 5

[[file]]
arch = "A0"
url = "https://example.org/net.pth"
input_size = 224
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("net.pth", ".."),
        ("net.pth", "a%2Fb"),
        ("https:", "file:"),
        ("org/net", "org/n\\u001b[2J"),
        ('arch = "A0"', 'arch = "A0"\nname = "../../net.pth"'),
        ('arch = "A0"', 'arch = "A0"\nsha256 = "' + "g" * 64 + '"'),
        ('arch = "A0"', 'arch = "A0"\nbytes = -1'),
        ("224", "0"),
        ("224", "true"),
        ("classes = 5", "classes = 1e9"),
        ("[[file]]", "[file]"),
        (TABLE, "[" * 10_000),
        (TABLE, "\xff"),
    ],
)
def test_a_table_that_is_damaged_or_leads_out_of_the_cache_is_one_error(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(TABLE)
    assert load_published(tmp_path)[0].file_name == "net.pth"
    path.write_bytes(TABLE.replace(old, new).encode("latin-1"))
    with pytest.raises(DeployError, match=r"x\.toml"):
        load_published(tmp_path)


@pytest.mark.parametrize(
    ("name", "found"), [("openmmlab/B2", "openmmlab/B2"), ("TIMM/repvgg-a0", "timm/A0"), ("b1g2", "openmmlab/B1g2")]
)
def test_names_are_found_in_any_case_and_without_a_source_where_one_has_it(name: str, found: str) -> None:
    assert find_published(name).name == found


@pytest.mark.parametrize(
    ("name", "hint"), [("B2", "openmmlab/B2, timm/B2"), ("timm/B7", "timm/A0"), ("x", "holocron/A0")]
)
def test_a_name_that_is_none_lists_those_that_are(name: str, hint: str) -> None:
    with pytest.raises(DeployError) as raised:
        find_published(name)
    assert hint in raised.value.hint


@pytest.fixture
def own_table(checkpoint_file: Path, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models of this release, with one published file, of the loopback server; its checkpoint."""
    models = tmp_path / "models"
    (models / "published").mkdir(parents=True)
    for card in data_folder("models").glob("*.toml"):
        (models / card.name).write_bytes(card.read_bytes())
    server.files["/timm/net.pth"] = checkpoint_file.read_bytes()
    digest = hashlib.sha256(checkpoint_file.read_bytes()).hexdigest()
    (models / "published" / "holocron.toml").write_text(
        f'source = "a test"\nclasses = 5\n[[file]]\narch = "A0"\nurl = "{server.url}/timm/net.pth"\n'
        f'sha256 = "{digest}"\ninput_size = 32\n'
    )
    monkeypatch.setattr("repvgg_deploy.checkpoints.published.data_folder", lambda name: tmp_path / name)
    return checkpoint_file


def test_pull_copies_the_file_and_says_what_it_was_held_to(own_table: Path, tmp_path: Path) -> None:
    result = run("pull", "holocron/A0", "-o", tmp_path / "here" / "mine.pth", "--json")
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    schema = json.loads((Path(__file__).parents[2] / "docs" / "schemas" / "pull.json").read_text(encoding="utf-8"))
    assert value.keys() == schema["properties"].keys()
    assert (tmp_path / "here" / "mine.pth").read_bytes() == own_table.read_bytes()
    assert (value["checked"], value["cached"], value["bytes"]) == ("sha256", False, own_table.stat().st_size)
    assert json.loads(run("pull", "holocron/A0", "--offline", "--json").stdout)["cached"] is True
    assert run("pull", "holocron/A0", "--list").exit_code == 2


@pytest.mark.slow
@pytest.mark.usefixtures("own_table")
def test_export_takes_a_published_checkpoint_and_its_input_size(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["export", "--arch", "A0", "--pretrained", "holocron", "--engine", "none", "-o"]
    result = run(*command, out, "--json", "--lock", tmp_path / "deploy.toml")
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert (value["onnx"], value["assumed"]["size"]["value"]) == (str(out / "net.fp32.onnx"), [32, 32])
    # A lock file names it as the command did, so that it is fetched where it is followed.
    again = run("export", "--from", tmp_path / "deploy.toml", "-o", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again" / "net.fp32.onnx").read_bytes() == (out / "net.fp32.onnx").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pull"], "--list"),
        (["export", "--pretrained", "timm"], "needs --arch"),
        (["export", "net.pth", "--arch", "A0", "--pretrained", "timm"], "stands in place of CKPT"),
        (["export"], "Missing argument 'CKPT', or --arch NAME --pretrained SOURCE"),
    ],
)
def test_what_contradicts_is_wrong_usage(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not published_folder().exists()
