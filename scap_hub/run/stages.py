"""How long the stages of a run take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from accelerate.utils import set_seed

from scap_hub.progress import announce, tell_stage


class Stages:
    """Seconds by stage; a stage that runs again adds up.

    Each begins with the same random state, so that one that a resumed run skips changes nothing in those after it.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times what is done meanwhile, and says what it is."""
        start = time.perf_counter()
        set_seed(self.seed)
        with announce(name):
            yield
        seconds = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        tell_stage(name, seconds)
