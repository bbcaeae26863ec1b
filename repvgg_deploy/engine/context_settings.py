"""What TensorRT-RTX creates the contexts of one engine from: its configurations, and its cache of compiled kernels."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from repvgg_deploy.engine.backends import Backend, has
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.staging import stage_files


class ContextSettings:
    """The runtime configurations of one engine, one for each way of giving memory, and the cache that all share.

    The library compiles kernels when a shape is first run. The cache keeps them for the next context and, in a file,
    for the next process; a file that does not fit (another driver, a damaged one) is replaced. The library refers to
    both for as long as there are contexts: they are kept here, and this object outlives the contexts.
    """

    def __init__(self, backend: Backend, engine: Any, path: Path | None) -> None:
        """Read the kernels that an earlier process left in `path`, if any."""
        self._trt = backend.module
        self._engine = engine
        self._path = path
        self._configs: dict[str, Any] = {}
        self._cache: Any = None
        self._stored = b""

    @staticmethod
    def has_any(backend: Backend) -> bool:
        """Whether the library has settings beyond the strategy for a context's memory."""
        trt = backend.module
        has_strategies = has(trt, "DynamicShapesKernelSpecializationStrategy")
        return has_strategies and has(trt, "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy")

    def config(self, strategy: Any) -> Any:
        """The configuration for contexts whose memory is given by `strategy`.

        The library would compile the kernels of a shape in the background and run a slow substitute meanwhile, which a
        CUDA graph would hold for good. EAGER compiles them in the first run.
        """
        if strategy.name not in self._configs:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
            self._share_cache(config)
            self._configs[strategy.name] = config
        return self._configs[strategy.name]

    def _share_cache(self, config: Any) -> None:
        if not (
            has(self._trt, "IRuntimeCache")
            and has(self._trt, "IRuntimeConfig.create_runtime_cache")
            and has(self._trt, "IRuntimeConfig.set_runtime_cache")
        ):
            return
        if self._cache is None:
            self._cache = cache = config.create_runtime_cache()
            with suppress(OSError):
                content = self._path.read_bytes() if self._path is not None else b""
                # The library holds it against itself, the GPU and the driver; if it differs, the cache stays empty.
                if content and cache.deserialize(content):
                    self._stored = content
        config.set_runtime_cache(self._cache)

    def close(self) -> None:
        """Keep the compiled kernels for the next process; where they cannot be written, they are compiled again."""
        cache, self._cache = self._cache, None
        if cache is not None:
            content = bytes(cache.serialize() or b"")
            if self._path is not None and content and content != self._stored:
                with suppress(OSError, DeployError), stage_files(self._path.parent, is_result=False) as staging:
                    (staging / self._path.name).write_bytes(content)
        self._configs.clear()
