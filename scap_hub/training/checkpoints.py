"""Checkpoints of a training, one an epoch, of which the last is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from scap_hub.errors import TrainingError
from scap_hub.training.distributed import accelerator


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in a folder, the last one last."""
    return sorted(folder.glob("checkpoint-[0-9]*"))


def save(folder: Path, epoch: int, identity: dict[str, Any]) -> None:
    """Writes everything that was prepared or registered; an interrupted write leaves the last checkpoint as it is.

    Args:
        folder: Where checkpoints are kept.
        epoch: The last one that is done.
        identity: What the training is; only the same training takes up there.
    """
    here = accelerator()
    unfinished = folder / "checkpoint.unfinished"
    if here.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        (unfinished / "run.json").write_text(json.dumps(identity))
    here.wait_for_everyone()
    here.save_state(str(unfinished))
    here.wait_for_everyone()
    if here.is_main_process:
        old = checkpoints(folder)
        unfinished.rename(folder / f"checkpoint-{epoch:05d}")
        for path in old:
            shutil.rmtree(path)
    here.wait_for_everyone()


def resume(folder: Path, identity: dict[str, Any]) -> bool:
    """Loads the last checkpoint into everything that was prepared or registered; returns whether there is one.

    Raises:
        TrainingError: It is of another training, or cannot be read.
    """
    found = checkpoints(folder)
    if not found:
        return False
    advice = "delete it or choose another folder"
    try:
        theirs = json.loads((found[-1] / "run.json").read_text())
        changed = [key for key, value in identity.items() if theirs.get(key) != value]
        if changed:
            raise TrainingError(f"{str(found[-1])!r} is of a run with another {', '.join(changed)}; {advice}")
        accelerator().load_state(str(found[-1]))
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise TrainingError(f"cannot resume from {str(found[-1])!r}: {str(error).splitlines()[0]}; {advice}") from error
    return True
