"""Triton's protocol, over HTTP and gRPC, answered by ONNX Runtime from a model repository; one request at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import numpy as np

from repvgg_deploy.serving import self_test

_TYPES = {"float32": "FP32", "uint8": "UINT8"}


class Repository:
    """The models of a folder that `package` wrote, in their first version."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, Lock()
        self.requests: list[tuple[int, ...]] = []

    def has(self, model: str) -> bool:
        return (self._folder / model / "config.pbtxt").is_file()

    def outputs(self, model: str) -> list[str]:
        return list(self_test.load_tensors(self._folder / model / "1" / "test_data_set_0", "output"))

    def run(self, model: str, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs of an ensemble for one image."""
        with self._lock:
            self.requests.append(pixels.shape)
            values: dict[str, Any] = {"pixels": pixels}
            for graph in self_test.find_graphs(self._folder / model / "1"):
                values = self_test.run_onnx(graph, values)
            return values

    def classify(self, model: str, scores: np.ndarray, count: int) -> np.ndarray:
        """As Triton's classification extension: `score:index:label`, best first."""
        labels = (self._folder / model / "labels.txt").read_text().splitlines()
        best = np.argsort(-scores.ravel(), kind="stable")[:count]
        return np.array([f"{scores.ravel()[i]:f}:{i}:{labels[i]}".encode() for i in best], object)


def serialize(values: np.ndarray) -> bytes:
    if values.dtype == object:
        return b"".join(struct.pack("<I", len(value)) + value for value in values.ravel())
    return values.tobytes()


@contextmanager
def serve_http(repository: Repository) -> Iterator[str]:
    """A server on the loopback address, as `host:port`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            model = self.path.split("/")[3]
            if not repository.has(model):
                self._send(400, b'{"error": "unknown model"}')
            elif self.path.endswith("/ready"):
                self._send(200, b"")
            else:
                outputs = [{"name": name, "datatype": "FP32", "shape": [1, -1]} for name in repository.outputs(model)]
                self._send(200, json.dumps({"name": model, "inputs": [], "outputs": outputs}).encode())

        def do_POST(self) -> None:
            model = self.path.split("/")[3]
            body = self.rfile.read(int(self.headers["Content-Length"]))
            size = int(self.headers["Inference-Header-Content-Length"])
            request, data = json.loads(body[:size]), body[size:]
            (image,) = request["inputs"]
            if image["datatype"] != "UINT8" or image["shape"][2:] != [3]:
                self._send(400, b'{"error": "unexpected shape or type for input pixels"}')
                return
            values = repository.run(model, np.frombuffer(data, np.uint8).reshape(image["shape"]))
            wanted = request.get("outputs") or [{"name": name} for name in values]
            described, parts = [], []
            for output in wanted:
                found = values[output["name"]]
                count = output.get("parameters", {}).get("classification", 0)
                found = repository.classify(model, found, count) if count else found
                parts.append(serialize(found))
                kind = "BYTES" if count else _TYPES[str(found.dtype)]
                described.append(
                    {"name": output["name"], "datatype": kind, "shape": list(found.shape),
                     "parameters": {"binary_data_size": len(parts[-1])}}
                )  # fmt: skip
            head = json.dumps({"model_name": model, "model_version": "1", "outputs": described}).encode()
            self._send(200, head + b"".join(parts), {"Inference-Header-Content-Length": str(len(head))})

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Nothing: pytest's output is for failures."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serve_grpc(repository: Repository) -> Iterator[str]:
    """As `serve_http`, with the service that tritonclient's own definition describes."""
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    class Service(service_pb2_grpc.GRPCInferenceServiceServicer):
        def ModelReady(self, request: Any, _: Any) -> Any:
            return service_pb2.ModelReadyResponse(ready=repository.has(request.name))

        def ModelMetadata(self, request: Any, _: Any) -> Any:
            answer = service_pb2.ModelMetadataResponse(name=request.name)
            for name in repository.outputs(request.name):
                answer.outputs.add(name=name, datatype="FP32")
            return answer

        def ModelInfer(self, request: Any, _: Any) -> Any:
            (image,), (data,) = request.inputs, request.raw_input_contents
            values = repository.run(request.model_name, np.frombuffer(data, np.uint8).reshape(tuple(image.shape)))
            answer = service_pb2.ModelInferResponse(model_name=request.model_name, model_version="1")
            for output in request.outputs:
                count = output.parameters["classification"].int64_param
                found = repository.classify(request.model_name, values[output.name], count)
                answer.outputs.add(name=output.name, datatype="BYTES", shape=found.shape)
                answer.raw_output_contents.append(serialize(found))
            return answer

    server = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
