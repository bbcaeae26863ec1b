"""`MODEL_CARD.md`: what the exported files are, what they were made from, and how they were compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from repvgg_deploy.artifacts import Parity
from repvgg_deploy.workflows.choices import list_choices

if TYPE_CHECKING:
    from repvgg_deploy.quantization.net import QuantizationSummary
    from repvgg_deploy.workflows.export_result import CheckpointExportResult

CARD = "MODEL_CARD.md"


@dataclass(frozen=True)
class CardInput:
    """What a card says.

    Attributes:
        checkpoint: the name of the file.
        result: the export in FP32, for what holds for all precisions.
        files: the name, size in bytes and sha256 of each file.
        columns, rows: the table of precisions.
        parities: the comparisons of each precision's export, by stage.
        quantization: how INT8 was made.
        images: what accuracy and agreement were measured on.
        speed: what the speed was measured in and on.
        tools: their versions.
    """

    checkpoint: str
    result: CheckpointExportResult
    files: Sequence[tuple[str, int, str]]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    parities: Mapping[str, Mapping[str, Parity]]
    quantization: QuantizationSummary | None
    images: str
    speed: str
    tools: Mapping[str, str]


def write_card(card: CardInput, path: Path) -> None:
    """Write the card as Markdown."""
    path.write_text("\n".join(_make_lines(card)) + "\n", encoding="utf-8")


def _make_lines(card: CardInput) -> Iterator[str]:
    result = card.result
    checkpoint = result.checkpoint
    yield from (f"# {result.arch}: {_code(card.checkpoint)}", "")
    classes = checkpoint.spec.classes
    yield f"An image classifier of {classes:,} classes with {result.parameters:,} parameters, exported by"
    version = card.tools["repvgg-deploy"]
    yield f"repvgg-deploy {version} from a checkpoint of the layout {checkpoint.layout}, {checkpoint.form} form."
    yield from ("", f"Checkpoint: {_code(card.checkpoint)}, sha256 {_code(checkpoint.sha256)}", "")
    yield from _table(("file", "bytes", "sha256"), [(_code(n), f"{b:,}", _code(h)) for n, b, h in card.files])
    yield from ("", "## Input", "", "What the tensors of a checkpoint do not tell, and what decided it:", "")
    yield from (f"- {name.replace('_', ' ')}: {_text(text)}" for name, text in list_choices(result.choices).items())
    yield from ("", "## Precisions", "", *_table(card.columns, card.rows), "")
    yield f"Accuracy and agreement: {_text(card.images)}."
    yield "Agreement is the share of images with the same best class as the FP32 graph. A dash stands for what was not"
    yield from ("measured: without labels there is no accuracy.", "")
    yield f"Speed: {_text(card.speed)}."
    yield "A short measurement, to compare the files with one another; `bench` measures longer."
    if card.quantization is not None:
        recipe, images = card.quantization.recipe, card.quantization.calibrated_on
        yield from ("", f"INT8: recipe {_text(recipe)}, calibrated on {_text(images)}.")
        if card.quantization.full_range:
            yield "Activations go up to 255: ONNX Runtime and OpenVINO run it, TensorRT would clip them at 127."
        yield from (f"Warning: {_text(warning)}." for warning in card.quantization.warnings)
    yield from ("", "## How it was verified", "")
    yield "Each stage was compared with the one before on the same images: the fused net with the training form in"
    yield "float64, the graph in ONNX Runtime with the net that it was made from, and an engine with its graph, where a"
    yield from ("GPU could run it.", "")
    rows = [
        (precision, stage, str(p.images), f"{p.max_abs:.3g}", f"{p.relative:.3g}", f"{p.top1_agreement:.1f}")
        for precision, stages in card.parities.items()
        for stage, p in stages.items()
    ]
    yield from _table(("precision", "stage", "images", "max abs", "relative", "agreement %"), rows)
    yield from ("", "## Tools", "", *(f"- {name} {version}" for name, version in card.tools.items()))
    yield from ("", "## Licence and data", "", "- licence of the weights: not stated", "- training data: not stated")
    yield from ("- licence of the training data: not stated", "- intended use and limits: not stated")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |"


def _code(text: str) -> str:
    """Text as code, in a line of its own or a cell; a name with a backtick keeps it."""
    plain = " ".join(text.split())
    return f"`` {plain} ``" if "`" in plain else f"`{plain}`"


def _text(text: str) -> str:
    """Text from names of files and settings, in one line and with nothing that Markdown would format."""
    return "".join(f"\\{c}" if c in "\\`*_<>[]#" else c for c in " ".join(text.split()))
