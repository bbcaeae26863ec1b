"""Send JPEGs to Triton, to an entry that `repvgg-deploy package --triton` wrote, and print the classes.

    python client.py photos/*.jpg                              # HTTP, the ensemble net_images of localhost:8000
    python client.py --grpc --url host:8001 --model net_images --topk 3 photos/*.jpg

A line per image: its path, and the best classes with their scores. Needs `pip install 'tritonclient[http]' Pillow`, or
`[grpc]`. Decoding is the client's: Triton gets pixels, upright and RGB, and the ensemble resizes and normalizes them.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

PIXELS = "pixels"
"""The input of the ensemble: uint8, height x width x 3, of any size."""

CONCURRENT = 8
"""Requests under way at once: Triton puts them together into batches."""


def decode(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The pixels of an image file, upright, in RGB."""
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


class Client:
    """A model of a server; HTTP and gRPC are used alike."""

    def __init__(self, url: str, model: str, topk: int, grpc: bool = False) -> None:
        """Ask the server whether it has the model, and what that outputs."""
        self._api = importlib.import_module(f"tritonclient.{'grpc' if grpc else 'http'}")
        self._url, self._model, self._topk = url, model, topk
        # The HTTP client must be used in the thread that made it, so each thread has a connection of its own.
        self._connections = threading.local()
        try:
            ready = self._server.is_model_ready(model)
        except (OSError, self._api.InferenceServerException) as error:
            raise SystemExit(f"error: {url} does not answer: {error}") from error
        if not ready:
            raise SystemExit(f"error: {url} has no model {model} that is ready")
        metadata = self._server.get_model_metadata(model)
        outputs = [output.name for output in metadata.outputs] if grpc else [o["name"] for o in metadata["outputs"]]
        self._outputs: list[str] = outputs

    @property
    def _server(self) -> Any:
        if not hasattr(self._connections, "server"):
            self._connections.server = self._api.InferenceServerClient(self._url)
        return self._connections.server

    def classify(self, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> list[str]:
        """The best classes, best first, each as `name score`."""
        image = self._api.InferInput(PIXELS, list(pixels.shape), "UINT8")
        image.set_data_from_numpy(pixels)
        # One output with a score per class; features and top-k pairs are printed as they are.
        name = next((name for name in self._outputs if name in ("logits", "probabilities")), None)
        if name is None:
            found = self._server.infer(self._model, [image])
            return [f"{name} {found.as_numpy(name).ravel()[: self._topk].tolist()}" for name in self._outputs]
        # Triton sorts the scores itself and answers with `score:index:label`, or without the label if it has none.
        wanted = self._api.InferRequestedOutput(name, class_count=self._topk)
        rows = self._server.infer(self._model, [image], outputs=[wanted]).as_numpy(name).ravel()
        parts = [row.decode().split(":", 2) for row in rows]
        return [f"{label[0] if label else index} {float(score):.4f}" for score, index, *label in parts]

    def classify_files(self, paths: Sequence[Path]) -> Iterator[tuple[Path, list[str] | Exception]]:
        """Each file with its classes or with what went wrong, in order, several requests at a time."""

        def send(path: Path) -> list[str] | Exception:
            try:
                return self.classify(decode(path))
            except (OSError, self._api.InferenceServerException) as error:
                return error

        with ThreadPoolExecutor(CONCURRENT) as pool:
            yield from zip(paths, pool.map(send, paths), strict=True)


def main(arguments: list[str] | None = None) -> int:
    """Print a line per image; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description="Send images to a Triton server and print their classes.")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--url", help="by default localhost:8000, with --grpc localhost:8001")
    parser.add_argument("--grpc", action="store_true")
    parser.add_argument("--model", default="net_images")
    parser.add_argument("--topk", type=int, default=5)
    options = parser.parse_args(arguments)
    url = options.url or ("localhost:8001" if options.grpc else "localhost:8000")
    client = Client(url, options.model, options.topk, options.grpc)
    failed = False
    for path, answer in client.classify_files(options.images):
        if isinstance(answer, Exception):
            print(f"{path}: {answer}", file=sys.stderr)
            failed = True
        else:
            print(f"{path}\t{', '.join(answer)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
