"""Pushes a saved model to the Hub in one commit, or not at all."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from scap_hub.errors import CheckpointError, PublishError
from scap_hub.files import path_of
from scap_hub.hub.card import HERE, PICTURE, merged_card
from scap_hub.hub.checkpoint import CONFIG, IMAGE_PROCESSOR, INDEX, PLAN, RECIPE, WEIGHTS, weight_files
from scap_hub.page import FAMILY, FAMILY_PICTURE, PAGE, REPORT, to_publish
from scap_hub.text import one_line
from scap_hub.zoo import modeling_scap
from scap_hub.zoo.base import CODE, LOCAL, ON_HUB
from scap_hub.zoo.pruned import check_loadable
from scap_hub.zoo.registry import pruned_entry
from scap_hub.zoo.remote import network_errors
from scap_hub.zoo.weights import stored_in

CARD = "README.md"
DEPLOYED = (
    *("deploy.json", "onnx/model.onnx", "onnx/model_quantized.onnx", "onnx/export.json"),
    *("onnx/model.onnx.data", "onnx/model_quantized.onnx.data"),
    *("openvino/openvino_model.xml", "openvino/openvino_model.bin", "openvino/export.json", "openvino/config.json"),
    *("openvino/openvino_model_quantized.xml", "openvino/openvino_model_quantized.bin"),
    *("executorch/model.pte", "executorch/model_quantized.pte", "executorch/export.json", "executorch/config.json"),
)
"""What `scap_hub.export` writes for those who have no scap_hub."""
# Only these are published beside the weights, whatever else lies in the folder. None of them is a pickle file.
FILES = (
    *(CONFIG, PLAN, RECIPE, IMAGE_PROCESSOR, CODE, CARD, PICTURE, REPORT, PAGE, FAMILY, FAMILY_PICTURE), *DEPLOYED,
)  # fmt: skip
_WEIGHT_NAMES = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_WAITS = (1.0, 2.0, 4.0)
_TRANSIENT = (429, 500, 502, 503, 504)
_STALE = 412


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> str:
    """Publishes a folder that `save_pretrained` wrote, in one commit; other files of the repository stay.

    A README.md that is there already keeps everything outside our block.

    Args:
        folder: The saved model; it stays as it is.
        repo_id: "owner/name", or "name" for one's own account; created where there is none.
        private: Whether a new repository is private.
        revision: Branch to push to, created where there is none; by default the main one.
        create_pr: Opens a pull request instead of committing.
        token: Hub token with write access; None uses the stored one.
        commit_message: First line of the commit message.

    Returns:
        The address of the repository, branch or pull request.

    Raises:
        CheckpointError: The folder holds no complete pruned model, or weights that cannot be read or do not fit.
        ModelError: The dense model cannot be rebuilt.
        PlanError: What its config or its plan cuts does not fit together.
        PublishError: No token, no write access, an invalid name, or a network that fails; nothing is published then.
    """
    folder = path_of(folder)
    files = _files(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"{repo_id!r} is no Hub id: {one_line(error)}") from None
    api = HfApi(token=token)
    push = _Push(api, repo_id, revision, create_pr, commit_message or "Upload pruned model with scap_hub")
    try:
        _writer(api)
        push.repo_id = _again(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        if revision and not revision.startswith("refs/"):
            _again(lambda: api.create_branch(push.repo_id, branch=revision, exist_ok=True))
        return _again(lambda: push(files))
    except (HTTPError, OSError, LocalTokenNotFoundError) as error:
        retry = _command(folder, repo_id, private, revision, create_pr)
        raise PublishError(
            f"{_reason(error, repo_id)}; nothing was published, {folder} is as it was: {retry}"
        ) from None


class _ReadOnly(OSError):
    """The token may only read."""


class _Push:
    """One attempt: reads the card that is there, and commits on top of what it read."""

    def __init__(self, api: HfApi, repo_id: str, revision: str | None, create_pr: bool, message: str) -> None:
        self.api, self.repo_id, self.revision = api, repo_id, revision
        self.create_pr, self.message = create_pr, message

    def __call__(self, files: dict[str, Path | bytes]) -> str:
        there = self.api.model_info(self.repo_id, revision=self.revision)
        files = {**files, CARD: self._card(files[CARD], there.sha)}
        names = [file.rfilename for file in there.siblings or ()]
        # Weights of an earlier push under other names, shards or none, would be loaded instead of these.
        stale = [name for name in names if _WEIGHT_NAMES.fullmatch(name) and name not in files]
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        info = self.api.create_commit(
            self.repo_id,
            [*map(CommitOperationDelete, stale), *additions],
            commit_message=self.message,
            revision=self.revision,
            create_pr=self.create_pr,
            parent_commit=there.sha,
        )
        url = f"{self.api.endpoint}/{self.repo_id}"
        return info.pr_url or (f"{url}/tree/{self.revision}" if self.revision else url)

    def _card(self, ours: Path | bytes, head: str | None) -> bytes:
        text = ours.decode() if isinstance(ours, bytes) else ours.read_text(encoding="utf-8")
        text = text.replace(LOCAL + HERE, ON_HUB + self.repo_id).replace(HERE, self.repo_id)
        try:
            theirs = self.api.hf_hub_download(self.repo_id, CARD, revision=head)
        except RemoteEntryNotFoundError:  # a LocalEntryNotFoundError is a network that is gone
            return text.encode()
        return merged_card(Path(theirs).read_text(encoding="utf-8", errors="replace"), text).encode()


def _files(folder: Path) -> dict[str, Path | bytes]:
    """What is published, by name."""
    weights = [path.name for path in weight_files(folder)]
    names = [*FILES, *weights] if weights == [WEIGHTS] else [*FILES, *weights, INDEX]
    files: dict[str, Path | bytes] = {name: folder / name for name in names if (folder / name).is_file()}
    if absent := [name for name in (CONFIG, *weights) if name not in files]:
        raise CheckpointError(f"{folder} holds no saved model: it lacks {', '.join(absent)}; save it again")
    stored_in([folder / name for name in weights])
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder} holds no saved model: its {CONFIG} is not JSON; save it again")
    if pruned_entry(config) is not None:
        check_loadable(folder)
    if "auto_map" in config:
        files[CODE] = Path(modeling_scap.__file__)
        own = {auto: reference.rpartition("--")[2] for auto, reference in config["auto_map"].items()}
        if own != config["auto_map"]:  # transformers, when it saves again, points at the repository it came from
            files[CONFIG] = (json.dumps(config | {"auto_map": own}, indent=2) + "\n").encode()
    files |= to_publish(folder)
    files.setdefault(CARD, f"# {folder.name}\n".encode())
    return files


def _writer(api: HfApi) -> None:
    """Makes sure that the token may write, before anything is sent."""
    if api.token is False or (api.token or get_token()) is None:
        raise LocalTokenNotFoundError
    token = _again(api.whoami).get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise _ReadOnly


def _again(call: Callable[[], Any]) -> Any:
    """Repeats a call that failed for reasons that pass; a commit on a stale parent starts from the new one."""
    for wait in (*_WAITS, None):
        try:
            with network_errors():
                return call()
        except HfHubHTTPError as error:
            status = error.response.status_code
            if wait is None or status not in (*_TRANSIENT, _STALE):
                raise
            after = error.response.headers.get("Retry-After", "")
            time.sleep(min(float(after), 60.0) if after.isdigit() else 0.0 if status == _STALE else wait)
        except LocalTokenNotFoundError:
            raise
        except (HTTPError, OSError):
            if wait is None:
                raise
            time.sleep(wait)


def _reason(error: Exception, repo_id: str) -> str:
    if isinstance(error, LocalTokenNotFoundError):
        return "no Hub token: run `hf auth login`, set HF_TOKEN, or pass token="
    if isinstance(error, _ReadOnly):
        return "this Hub token may only read: make one that may write at huggingface.co/settings/tokens"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return "the Hub refuses this token: run `hf auth login` again"
    if status == 403 or isinstance(error, RepositoryNotFoundError):
        return f"this Hub token may not write to {repo_id!r}: check the owner's name and the token's rights"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id!r} has no such revision"
    if status == _STALE:
        return f"others keep committing to {repo_id!r}"
    return f"the Hub cannot be reached, or fails ({f'HTTP {status}' if status else type(error).__name__})"


def _command(folder: Path, repo_id: str, private: bool, revision: str | None, create_pr: bool) -> str:
    """What to type to try again; never the token."""
    parts = ["scap-hub", "push", str(folder), repo_id]
    parts += ["--private"] * private + (["--revision", revision] if revision else []) + ["--create-pr"] * create_pr
    return shlex.join(parts)
