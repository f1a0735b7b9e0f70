"""Commands for what a run has saved: report, push, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from scap_hub.cli.options import AsJson, Quiet
from scap_hub.cli.output import output, say, show_deployment


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
    to: Annotated[str, typer.Option(help="onnx, openvino, executorch or torch-export.")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="The file; its usual place in the folder if left out.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Eight bits, measured beside float32.")] = False,
    data: Annotated[str | None, typer.Option(help="Images for int8; those of the run if left out.")] = None,
    max_loss: Annotated[float, typer.Option(min=0, max=1, help="What int8 may lose of the metric.")] = 0.01,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Export a saved model for any batch size, and check that the file computes the same.

    Example: scap-hub export resnet50-half --to onnx --int8 --data me/flowers
    """
    with output(quiet or as_json):
        import scap_hub

        made = scap_hub.export(folder, to, out, int8=int8, dataset=data, max_loss=max_loss)
    if as_json:
        measured = {"deploy": made.deployment.to_dict()} if made.deployment else {}
        print(json.dumps({"file": str(made.file), "size_multiple": made.size_multiple, **measured}))
    elif made.deployment and not quiet:
        show_deployment(made.deployment)
    if made.size_multiple:
        any_size = made.size_multiple == 1
        which = "of any height and width" if any_size else f"whose sides are multiples of {made.size_multiple}"
        say(f"for images {which}", quiet or as_json)
    say(str(made.file), quiet or as_json)
