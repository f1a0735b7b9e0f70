"""Where a data set comes from: the package, a file, a folder, the Hub, or the caller's hands."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HTTPError

from scap_hub.errors import DataError
from scap_hub.files import path_of
from scap_hub.recipe import DataSettings
from scap_hub.text import one_line
from scap_hub.training.data.folders import VALIDATION_SPLITS, image_folder
from scap_hub.zoo.remote import refusals

DIGITS = Path(__file__).parents[2] / "data" / "digits"
_SHARDS = 64
"""Parts of a stream of image files, which its readers share."""


def open_splits(name: str, settings: DataSettings) -> dict[str, Any]:
    """Splits of a data set that is given by name, by split name.

    Args:
        name: "digits", a Hub id, an image folder, a parquet file or folder, or a save_to_disk folder.
        settings: The recipe's `data` block: its revision, and whether to stream.

    Raises:
        DataError: There is no such data set, or it cannot be read.
    """
    if name == "digits":
        return _digits()
    path = path_of(name)
    with _refusals(name, path):
        return as_splits(_opened(name, path, settings))


def ensure_there(name: str, settings: DataSettings) -> None:
    """Finds out whether there is such a data set, without reading it: before a model is loaded for it.

    Raises:
        DataError: There is none.
    """
    import datasets

    path = path_of(name)
    if name == "digits" or path.exists():
        return
    with _refusals(name, path):
        _ensure_reachable(name, path, settings)
        datasets.load_dataset_builder(name, revision=settings.revision)


@contextlib.contextmanager
def _refusals(name: str, path: Path) -> Iterator[None]:
    """Says in one line why `datasets` refuses a data set."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # files of anybody's, in a foreign library
        where = "as a folder" if path.exists() else "on the Hub, and there is no such folder"
        raise DataError(f"data set {name!r} cannot be loaded {where}: {' '.join(str(error).split())}") from error


def is_rows(source: Any) -> bool:
    """Whether this is a data set of `datasets`; if that was never imported, nothing is."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(source, (datasets.Dataset, datasets.IterableDataset))


def as_splits(source: Any) -> dict[str, Any]:
    """Splits of a `datasets` object, by name.

    Raises:
        DataError: It is something else.
    """
    if is_rows(source):
        return {str(source.split or "train"): source}
    if isinstance(source, Mapping) and source:
        return dict(source)
    raise DataError(
        "a data set is a name, a folder, a datasets.Dataset or DatasetDict, a torch data set, or a DataLoader, "
        f"not {type(source).__name__}"
    )


def split_names(splits: Mapping[str, Any], settings: DataSettings) -> tuple[str | None, str | None, str | None]:
    """Names of the splits for training, validation and testing; None where there is no such split.

    Raises:
        DataError: A split that the settings name is not there.
    """
    alone = list(splits) if len(splits) == 1 else []
    return (
        _split_name(splits, settings.train_split, ["train", *alone], "training"),
        _split_name(splits, settings.validation_split, VALIDATION_SPLITS, "validation"),
        _split_name(splits, settings.test_split, ["test"], "testing"),
    )


def _split_name(splits: Mapping[str, Any], asked: str | None, usual: Sequence[str], purpose: str) -> str | None:
    """The split that was asked for, or the first of the usual ones that is there."""
    if asked is not None and asked not in splits:
        raise DataError(f"no split {asked!r} for {purpose}; the data set has {', '.join(splits)}")
    return asked or next((name for name in usual if name in splits), None)


def _digits() -> dict[str, Any]:
    """The data set that travels in the package."""
    import datasets
    import pyarrow.parquet

    return {
        split: datasets.Dataset(pyarrow.parquet.read_table(DIGITS / f"{split}.parquet")) for split in ("train", "test")
    }


def _opened(name: str, path: Path, settings: DataSettings) -> Any:
    import datasets

    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    if path.suffix == ".parquet" and path.is_file():
        return datasets.load_dataset("parquet", data_files=str(path), streaming=settings.streaming)
    if path.is_dir() and (splits := image_folder(path)):
        if not settings.streaming:
            return splits
        return {split: rows.to_iterable_dataset(min(len(rows), _SHARDS)) for split, rows in splits.items()}
    if path.exists():
        return datasets.load_dataset(str(path), streaming=settings.streaming)
    _ensure_reachable(name, path, settings)
    return datasets.load_dataset(name, revision=settings.revision, streaming=settings.streaming)


def _ensure_reachable(name: str, path: Path, settings: DataSettings) -> None:
    if path.is_absolute() or name.startswith(("~", ".")):
        raise DataError(f"no data set {name!r}: there is no such file or folder")
    _ask_hub(name, settings.revision)


def _ask_hub(name: str, revision: str | None) -> None:
    """Asks one quick question first, because `datasets` repeats a refused connection for 23 s."""
    if constants.HF_HUB_OFFLINE:
        return
    try:
        with refusals(name, revision, DataError, "data set"):
            HfApi().dataset_info(name, revision=revision, timeout=10)
    except (HTTPError, OSError) as error:
        raise DataError(
            f"cannot reach the Hub for data set {name!r}, and there is no such folder ({one_line(error)}): connect, "
            "give a local folder, or set HF_HUB_OFFLINE=1 to use the copy in the local cache"
        ) from None
