"""The progress monitor of a build: it reports how far the build is, and stops it when asked to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from repvgg_deploy.engine.backends import Backend
from repvgg_deploy.hardware.threads import Cancellation
from repvgg_deploy.progress import Progress

_STEP = "building the engine"


class PhaseTree:
    """The nested phases of a build as one step, of which a share between 0 and 1 is done; the share never falls."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._phases: dict[str, tuple[str | None, int, int]] = {}
        self._share = 0.0

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase of `steps` begins inside the current step of `parent`."""
        self._phases[phase] = (parent, max(steps, 1), 0)
        self._progress.step(_STEP, self._share, 1.0)

    def step(self, phase: str, done: int) -> None:
        """Step number `done` of a phase is finished."""
        if phase not in self._phases:
            return
        parent, steps, _ = self._phases[phase]
        self._phases[phase] = (parent, steps, min(done + 1, steps))
        share = self._fraction(phase)
        if share > self._share:
            self._share = share
            self._progress.step(_STEP, share, 1.0)

    def finish(self, phase: str) -> None:
        """A phase is over; where it was the outermost one, all is done."""
        parent, _, _ = self._phases.pop(phase, ("", 1, 0))
        if parent is None:
            self._share = 1.0
            self._progress.step(_STEP, 1.0, 1.0)

    def _fraction(self, phase: str) -> float:
        inner = 0.0
        current: str | None = phase
        # As many steps up as there are phases: two phases of one name must not make a circle.
        for _ in range(len(self._phases)):
            if current is None or current not in self._phases:
                break
            parent, steps, done = self._phases[current]
            inner = min(1.0, (done + inner) / steps)
            current = parent
        return inner


def make_monitor(backend: Backend, progress: Progress, cancellation: Cancellation) -> Any:
    """The library's IProgressMonitor that reports to `progress` and stops the build when asked to.

    An exception of `progress` must not unwind through the library's frames: it cancels the build, and is kept in
    the monitor's `error`.
    """
    base: Any = backend.module.IProgressMonitor
    tree = PhaseTree(progress)

    class Monitor(base):  # type: ignore[misc]
        error: BaseException | None = None

        def __init__(self) -> None:
            base.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._guard(lambda: tree.start(phase_name, parent_phase, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._guard(lambda: tree.step(phase_name, step))
            return not cancellation.is_wanted

        def phase_finish(self, phase_name: str) -> None:
            self._guard(lambda: tree.finish(phase_name))

        def _guard(self, call: Callable[[], None]) -> None:
            try:
                call()
            except BaseException as error:
                self.error = self.error or error
                cancellation.cancel()

    return Monitor()
