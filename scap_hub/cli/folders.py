"""Commands for what a run has saved: report, push, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from scap_hub.cli.options import AsJson, Quiet
from scap_hub.cli.output import output, say


def report(
    folder: Annotated[Path, typer.Argument(help="Folder that prune saved.")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write report.html anew from the other files of a folder, such as a comparison.json that was added.

    Example: scap-hub report resnet50-half
    """
    with output(quiet):
        from scap_hub.page import write_page

        path, lacks = write_page(folder)
    if as_json:
        print(json.dumps({"file": str(path), "lacks": lacks}))
    say(str(path), quiet or as_json)
    if lacks:
        say(f"{folder} is from an earlier version: {lacks}", quiet or as_json)


def push(
    folder: Annotated[Path, typer.Argument(help="Folder that prune saved.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name, or name for your own account.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if absent.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Publish a saved model on the Hub in one commit; log in first with `hf auth login`.

    Example: scap-hub push resnet50-half me/resnet50-half
    """
    with output(quiet):
        from scap_hub.hub.publish import push_to_hub

        url = push_to_hub(folder, repo_id, private, revision, create_pr, commit_message=message)
    if as_json:
        print(json.dumps({"url": url}))
    say(url, quiet or as_json)


def export(
    folder: Annotated[str, typer.Argument(help="Folder that prune saved, or its Hub id.")],
    to: Annotated[str, typer.Option(help="onnx or torch-export.")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="The file; model.onnx or model.pt2 in the folder.")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Export a saved model for any batch size, and check that the file computes the same.

    Example: scap-hub export resnet50-half --to onnx
    """
    with output(quiet):
        from scap_hub.hub.export import export as write

        path = write(folder, to, out)  # type: ignore[arg-type]
    if as_json:
        print(json.dumps({"file": str(path)}))
    say(str(path), quiet or as_json)
