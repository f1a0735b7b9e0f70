"""Starts `tests/hub_server.py`, and talks to it from the tests' side."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import HfApi

ROOT = Path(__file__).parents[1]


class HubProcess:
    def __init__(self, endpoint: str, storage: str) -> None:
        self.endpoint, self.storage = endpoint, storage

    def fail(self, match: str, action: str, times: int = 1, method: str = "POST") -> None:
        """Makes the next requests fail whose path matches."""
        body = {"fail": [{"match": match, "action": action, "times": times, "method": method}] if match else []}
        urllib.request.urlopen(f"{self.endpoint}/_control", json.dumps(body).encode()).close()

    def log(self) -> list[dict]:
        with urllib.request.urlopen(f"{self.endpoint}/_log") as answer:
            return json.load(answer)

    def used_here(self, patch: pytest.MonkeyPatch, *modules: str) -> None:
        """Makes it the Hub of this process, and of these modules of `scap_hub.hub`."""
        # huggingface_hub 1.3.0 takes the address of a commit apart by its own endpoint, not by the one of its HfApi.
        files = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        here = {"ENDPOINT": self.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": files}
        for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, **here}.items():
            patch.setattr(f"huggingface_hub.constants.{name}", value)
        for module in modules:
            patch.setattr(f"scap_hub.hub.{module}.HfApi", functools.partial(HfApi, endpoint=self.endpoint))

    def environment(self, home: Path, **extra: str) -> dict[str, str]:
        """For a fresh process whose Hub this is."""
        own = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        hub = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return {**own, **hub, **quiet, **extra}


@contextmanager
def running_hub() -> Iterator[HubProcess]:
    """The Hub, as its own process."""
    command = [sys.executable, str(ROOT / "tests" / "hub_server.py")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield HubProcess(**json.loads(process.stdout.readline()))
    finally:
        process.stdin.close()
        process.wait(10)
