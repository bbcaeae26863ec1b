"""TensorRT engines: built from ONNX graphs, checked, loaded, run, refitted.

`find_backend` says what can build here, `build_engine` writes a plan and its sidecar, `runner.open_engine` runs
it, `inspect_engine` and `refit_engine` (in `inspection` and `refit`) do what their names say.
"""

from repvgg_deploy.engine.backends import Backend, Unavailable, find_backend
from repvgg_deploy.engine.building import Engine, build_engine
from repvgg_deploy.engine.options import BuildOptions

__all__ = ["Backend", "BuildOptions", "Engine", "Unavailable", "build_engine", "find_backend"]
