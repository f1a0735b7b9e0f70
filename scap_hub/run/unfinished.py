"""What a run keeps on disk until its result is saved."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from scap_hub.errors import ScapHubError, VerificationError
from scap_hub.training.distributed import accelerator, from_main


@contextlib.contextmanager
def kept_beside(output_dir: str | Path | None) -> Iterator[Path | None]:
    """A hidden folder beside the output, for scores and checkpoints; None where nothing is saved.

    It goes when the run ends well, and when it ends with a mistake of the user before any training. After anything
    else it stays, so that the same call takes up there; also after a verification that failed, which another recipe may
    avoid.

    Args:
        output_dir: Where the result will be saved; None to save nothing.
    """
    if output_dir is None:
        yield None
        return
    output = Path(output_dir).expanduser()
    work = output.with_name(f".{output.name}.unfinished")
    try:
        yield work
    except VerificationError:
        raise
    except ScapHubError:
        if accelerator().is_main_process and not any(work.glob("training-*")):
            shutil.rmtree(work, ignore_errors=True)
        raise
    from_main(lambda: shutil.rmtree(work, ignore_errors=True))
