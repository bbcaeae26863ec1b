"""A progress that remembers what it was told."""

from __future__ import annotations

from collections.abc import Callable


class Heard:
    """`notes` and `steps` in the order in which they came; `on_note` and `on_step` are called with each as well."""

    def __init__(
        self,
        on_note: Callable[[str], object] = lambda _text: None,
        on_step: Callable[[str, float, float], object] = lambda *_: None,
    ) -> None:
        self.notes: list[str] = []
        self.steps: list[tuple[str, float, float]] = []
        self._on_note = on_note
        self._on_step = on_step

    def note(self, text: str, /) -> None:
        self.notes.append(text)
        self._on_note(text)

    def step(self, name: str, done: float, total: float, /) -> None:
        self.steps.append((name, done, total))
        self._on_step(name, done, total)
