"""What the stages of a run found, on disk: a stage whose result is there does not run again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from scap_hub.errors import CheckpointError
from scap_hub.files import replacing
from scap_hub.private import versioned
from scap_hub.text import one_line
from scap_hub.training.checkpoints import separate
from scap_hub.training.distributed import accelerator, from_main

T = TypeVar("T")


class Kept:
    """A folder of JSON documents and safetensors files, written and read by the main process alone."""

    def __init__(self, folder: Path | None) -> None:
        """Args: folder: Where things are kept; None to keep nothing."""
        self.folder = folder

    def value(self, name: str, kind: Any, make: Callable[[], T]) -> T:
        """What is kept under a name; made on all processes, and kept, if nothing is.

        Args:
            name: Name of the file, without its suffix.
            kind: Type of the value, of dataclasses, models of pydantic, lists, dicts and plain values.
            make: Makes it.

        Raises:
            CheckpointError: The file is damaged, or cannot be written.
        """
        if self.folder is None:
            return make()
        adapter, path = TypeAdapter(kind), self.folder / f"{name}.json"
        found = from_main(lambda: [_read(path, adapter)] if path.is_file() else [])
        if found:
            return found[0]
        made = make()
        from_main(lambda: _write(path, json.dumps(adapter.dump_python(made))))
        return made

    def weights(self, name: str, model: nn.Module, change: Callable[[], object]) -> None:
        """Gives a model the weights that are kept under a name; changes it in place, and keeps them, if none are.

        Raises:
            CheckpointError: The file is damaged, or cannot be written.
        """
        if self.folder is None:
            change()
            return
        path = self.folder / f"{name}.safetensors"
        state = from_main(lambda: _tensors(path) if path.is_file() else None)
        if state is None:
            change()
            if accelerator().is_main_process:
                state = separate(model.state_dict())
            from_main(lambda: _save(path, state))
            return
        try:
            model.load_state_dict(versioned(model, state))
        except RuntimeError as error:
            raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> CheckpointError:
    """The error for a file that cannot be read."""
    return CheckpointError(f"cannot read {str(path)!r}, which an interrupted run left ({one_line(error)}); {ADVICE}")


ADVICE = "begin anew with --restart (restart=True)"


def _read(path: Path, adapter: TypeAdapter) -> Any:
    try:
        return adapter.validate_python(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error


def _tensors(path: Path) -> dict[str, Any]:
    try:
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise damaged(path, error) from error


def _write(path: Path, text: str) -> None:
    try:
        with replacing(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise unwritable(path, error) from error


def _save(path: Path, state: Any) -> None:
    try:
        with replacing(path) as unfinished:
            save_file(state, unfinished)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: Exception) -> CheckpointError:
    """The error for a file that cannot be written."""
    return CheckpointError(f"cannot write {str(path)!r}: {one_line(error)}; make room, or choose another output folder")


def bytes_kept(model: nn.Module, trains: bool) -> int:
    """Bytes that a run keeps at most: repaired and final weights, and a checkpoint with its optimiser if it trains."""
    return sum(tensor.nbytes for tensor in model.state_dict().values()) * (6 if trains else 2)
