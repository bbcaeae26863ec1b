"""The timing cache on disk: one file per library version and GPU, locked while a build uses it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from repvgg_deploy.engine.backends import Backend
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.places import cache_folder
from repvgg_deploy.files.staging import stage_files
from repvgg_deploy.hardware.gpus import Gpu
from repvgg_deploy.progress import Progress


def cache_path(backend: Backend, gpu: Gpu | None) -> Path:
    """The cache of one library, version and GPU: kernel times hold for nothing else."""
    return cache_folder() / f"{_key(backend, gpu)}.timing"


def runtime_cache_path(backend: Backend, gpu: Gpu | None, plan_sha256: str) -> Path:
    """Where the kernels that a library compiles when it runs one engine are kept: beside the timing cache."""
    return cache_folder() / f"{_key(backend, gpu)}-{plan_sha256[:16]}.runtime"


def _key(backend: Backend, gpu: Gpu | None) -> str:
    device = f"{gpu.name}-sm{gpu.compute_capability}" if gpu is not None else "no-gpu"
    return re.sub(r"[^A-Za-z0-9.]+", "-", f"{backend.name}-{backend.version}-{device}")


@contextmanager
def use_timing_cache(backend: Backend, config: Any, gpu: Gpu | None, progress: Progress) -> Iterator[bool]:
    """Attach the cache to `config`, hold its lock during the block, and store it when the block ends well.

    Yields whether a stored cache was there. The lock is held for the whole build: two builds on one GPU would also
    disturb each other's measurements. Where the folder cannot be written, the build continues without a cache.
    """
    try:
        path = cache_path(backend, gpu)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquire(path, progress)
    except DeployError as error:
        progress.note(f"note: no timing cache: {error.message}")
        yield False
        return
    except OSError as error:
        progress.note(f"note: no timing cache in {path.parent}: {error.strerror}")
        yield False
        return
    try:
        content = path.read_bytes() if path.is_file() else b""
        _attach(config, content)
        yield bool(content)
        _store(config, path, progress)
    finally:
        lock.release()


def _acquire(path: Path, progress: Progress) -> FileLock:
    # Not on the cache itself: it is replaced by another file, and a lock stays with the old one.
    lock = FileLock(path.with_name(path.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress.note(f"another build has locked {lock.lock_file}; waiting for it")
        lock.acquire()
    return lock


def _attach(config: Any, content: bytes) -> None:
    # TensorRT-RTX keeps these calls as deprecated no-ops, and warns.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        cache = config.create_timing_cache(content)
        # A cache that the library refuses (damaged, or of another GPU) is replaced by an empty one.
        if cache is None or not config.set_timing_cache(cache, False):
            config.set_timing_cache(config.create_timing_cache(b""), False)


def _store(config: Any, path: Path, progress: Progress) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        cache = config.get_timing_cache()
        content = bytes(cache.serialize()) if cache is not None else b""
    try:
        with stage_files(path.parent, is_result=False) as staging:
            (staging / path.name).write_bytes(content)
    except DeployError as error:
        progress.note(f"note: the timing cache was not stored: {error.message}")
