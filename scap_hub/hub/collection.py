"""A collection on the Hub of models that belong together."""

from __future__ import annotations

from collections.abc import Sequence

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from scap_hub.errors import PublishError
from scap_hub.text import one_line


def collect(repo_id: str, urls: Sequence[str], private: bool = False, token: str | bool | None = None) -> str:
    """Makes a collection, or adds to the one of that name.

    Args:
        repo_id: "owner/name"; its last part is the title.
        urls: Addresses of model repositories.
        private: Whether a new collection is private.
        token: Hub token with write access; None uses the stored one.

    Returns:
        Its address.

    Raises:
        PublishError: The Hub refuses, or cannot be reached; the models are published all the same.
    """
    api = HfApi(token=token)
    models = [url.removeprefix(api.endpoint).strip("/") for url in urls]
    owner, title = models[0].split("/")[0], repo_id.rpartition("/")[2]
    try:
        made = api.create_collection(title, namespace=owner, private=private, exists_ok=True)
        for model in models:
            api.add_collection_item(made.slug, model, "model", exists_ok=True)
    except (HfHubHTTPError, HTTPError, OSError) as error:
        raise PublishError(
            f"the models are published ({', '.join(models)}), but the collection {title!r} is not: {one_line(error)}; "
            "add them to one at huggingface.co/collections"
        ) from error
    return made.url
