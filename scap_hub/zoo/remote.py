"""Files of a Hub repo, from the network or the local cache, with one clear error when neither has them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from scap_hub.errors import ModelError, ScapHubError

NO_NETWORK = (
    "connect, give a local folder, or do without trained weights: pretrained=False, or on the command line "
    "--set model_pretrained=false"
)


def fetch(
    repo_id: str,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    advice: str,
    error: type[ScapHubError],
) -> Path:
    """Downloads a model repo's files that match the patterns, or finds them in the local cache.

    Args:
        repo_id: "owner/name".
        patterns: Shell patterns of file names; a pattern that matches nothing is no error.
        revision: Branch, tag or commit.
        token: Hub token; None uses the stored one.
        advice: What the user can do without a network; ends the error message.
        error: What to raise.

    Returns:
        The snapshot's folder.
    """
    try:
        with refusals(repo_id, revision, error), network_errors():
            # One quick question first: the download itself repeats a refused connection for 23 s a file.
            HfApi(token=token).model_info(repo_id, revision=revision, timeout=10)
            return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=list(patterns)))
    except (HTTPError, OSError):
        pass
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns), local_files_only=True))
    except LocalEntryNotFoundError:
        raise error(
            f"cannot reach the Hub for {repo_id!r}, there is no such folder, and it is not in the local cache: {advice}"
        ) from None


@contextlib.contextmanager
def refusals(repo_id: str, revision: str | None, error: type[ScapHubError], kind: str = "model") -> Iterator[None]:
    """Says in one line why the Hub refuses a repo; an unreachable Hub stays an HTTPError or OSError."""
    try:
        yield
    except GatedRepoError:
        raise error(f"{repo_id!r} is gated: accept its terms on its Hub page, then run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise error(
            f"the Hub has no {kind} {repo_id!r}, or it is private: check the name, or `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise error(f"{repo_id!r} has no revision {revision!r} on the Hub: check its branches and tags") from None
    except HFValidationError:
        raise error(f"{repo_id!r} is neither a local folder nor a Hub id such as 'owner/name'") from None


@contextlib.contextmanager
def network_errors() -> Iterator[None]:
    """Makes an HTTPError or OSError again of what huggingface_hub reports as a RuntimeError.

    So it wraps what a storage answers. And before 1.28, once the network was gone, it tries again with a client that it
    has closed itself.
    """
    try:
        yield
    except RuntimeError as error:
        cause = error.__cause__ or error
        if "client has been closed" in str(cause):
            raise ConnectionError("the network was gone") from None
        raise cause if isinstance(cause, HTTPError | OSError) else error from None


def fetch_dense(repo_id: str, pretrained: bool, revision: str | None = None) -> Path:
    """Downloads what it takes to build a model: the documents, and the weights if asked for.

    Raises:
        ModelError: No such repo, no network, or no weights.
    """
    documents = ("config.json", "preprocessor_config.json", "pruning_plan.json", "README.md")
    options: dict[str, Any] = {"revision": revision, "advice": NO_NETWORK, "error": ModelError}
    if not pretrained:
        return fetch(repo_id, documents, **options)
    folder = fetch(repo_id, (*documents, "model*.safetensors*"), **options)
    if not any(folder.glob("*.safetensors")):
        # Old repos; timm and transformers read these with the weights-only unpickler.
        folder = fetch(repo_id, (*documents, "pytorch_model*.bin*"), **options)
    if not any((*folder.glob("*.safetensors"), *folder.glob("*.bin"))):
        raise ModelError(f"no weights for {repo_id!r}, neither on the Hub nor in the local cache: {NO_NETWORK}")
    return folder
