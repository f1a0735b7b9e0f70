"""Short texts that change when a model or a data set does."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from scap_hub.training.data.images import Images
from scap_hub.training.data.stream import Stream

WHOLE = 256 * 2**20
"""Bytes up to which a data set is read whole; of a larger one `SAMPLE` rows are."""
SAMPLE = 1024


def of_tensors(tensors: Iterable[Tensor], about: object = None) -> str:
    """Of shapes, dtypes and values."""
    return _of([about, list(tensors)])


def of_weights(model: nn.Module) -> str:
    """Of all parameters and buffers, with their names."""
    return _of([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def of_architecture(model: nn.Module) -> str:
    """Of the modules as they print, and of the code of their classes."""
    kinds = sorted({type(module) for module in model.modules()}, key=lambda kind: kind.__qualname__)
    printed = re.sub(r"0x[0-9a-f]+", "", repr(model))  # addresses differ in every process
    return _of([printed, *(source_of(kind) for kind in kinds)])


def of_images(loaders: Mapping[str, DataLoader | None]) -> dict[str, str]:
    """Of the images and targets of loaders, as far as they can be known without running the caller's code; "none" where
    there is no loader.

    A data set is read once, of however many loaders it is a part.

    Rows of `datasets` count with all they hold, also the files that they only name. Of any other data set the class,
    the length, and the tensors, arrays, lists and texts among its attributes count, with the files that these name. A
    stream counts as what it says of itself.
    """
    whole: dict[int, str] = {}
    found = {}
    for name, loader in loaders.items():
        if loader is None:
            found[name] = "none"
            continue
        parts, dataset = [], loader.dataset
        while isinstance(dataset, Subset):
            parts.append(list(dataset.indices))
            dataset = dataset.dataset
        if id(dataset) not in whole:
            whole[id(dataset)] = _of(dataset)
        order = type(loader.sampler).__name__
        found[name] = _of([loader.batch_size, loader.drop_last, order, parts, whole[id(dataset)]])
    return found


def source_of(kind: Any) -> str:
    """The code of a class, where it can be read: a user may change it between two runs."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def _of(value: object) -> str:
    digest = hashlib.sha256()
    _add(digest, value)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Adds a value with its kind and length, so that no two values read alike."""
    digest.update(f"<{type(value).__qualname__}>".encode())
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        digest.update(repr((value.dtype, tuple(value.shape))).encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(repr((value.dtype, value.shape)).encode())
        digest.update(np.ascontiguousarray(value).view(np.uint8) if value.size else b"")
    elif isinstance(value, bytes):
        digest.update(repr(len(value)).encode())
        digest.update(value)
    elif isinstance(value, (list, tuple, np.ndarray)):
        digest.update(repr(len(value)).encode())
        for part in value:
            _add(digest, part)
    elif isinstance(value, dict):
        _add(digest, list(value.items()))
    elif isinstance(value, (str, int, float, bool, type(None), Path)):
        digest.update(repr(value).encode())
    else:
        _add_data_set(digest, value)


def _add_data_set(digest: Any, value: Any) -> None:
    import datasets

    if isinstance(value, Subset):
        _add(digest, [list(value.indices), value.dataset])
    elif isinstance(value, Images):
        _add(digest, [value.targets, value.reader.columns.image])
        placed = [value.placed] if value.placed is not None else []
        _add_rows(digest, value.rows.select_columns([value.reader.columns.image, *placed]))
    elif isinstance(value, Stream):
        _add_data_set(digest, value.rows)
    elif isinstance(value, datasets.Dataset):
        _add_rows(digest, value)
    elif isinstance(value, datasets.IterableDataset):
        about = value.info
        _add(digest, [str(value.split), str(about.features), about.dataset_name, str(about.version)])
    elif isinstance(value, Dataset):
        _add(digest, [source_of(type(value)), len(value) if hasattr(value, "__len__") else None])
        # Numbers and dicts are left out: counters and caches, which change while the data set is used.
        kept = (Tensor, np.ndarray, str, Path, list, tuple, Dataset, datasets.Dataset)
        held = [(name, held) for name, held in sorted(vars(value).items()) if isinstance(held, kept)]
        _add(digest, held)
        _add_files(digest, [Path(text) for text in dict.fromkeys(_texts(held)) if os.path.isfile(text)])


def _add_rows(digest: Any, rows: Any) -> None:
    """All rows, or of large data a sample that is spread evenly; also the files that they only name."""
    _add(digest, [str(rows.features), len(rows)])
    if rows.data.nbytes > WHOLE and len(rows) > SAMPLE:
        rows = rows.select(_spread(len(rows)))
    files = []
    for table in rows.with_format("arrow").iter(256):
        for column in table.column_names:
            values = table[column].to_pylist()
            _add(digest, [column, values])
            files += [Path(value["path"]) for value in values if _is_named(value)]
    _add_files(digest, files)


def _add_files(digest: Any, files: list[Path]) -> None:
    """What files hold, of large data that of a sample which is spread evenly."""
    sizes = [file.stat().st_size if file.is_file() else 0 for file in files]
    _add(digest, sizes)
    for index in range(len(files)) if sum(sizes) <= WHOLE else _spread(len(files)):
        with contextlib.suppress(OSError):  # the loader names what cannot be read
            _add(digest, files[index].read_bytes())


def _texts(value: Any) -> Iterator[str]:
    """All texts and paths in lists, tuples and arrays."""
    if isinstance(value, (str, Path)):
        yield str(value)
    elif isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.dtype.kind in "UO"):
        for part in value:
            yield from _texts(part)


def _spread(count: int) -> list[int]:
    return [int(index) for index in np.linspace(0, count - 1, min(count, SAMPLE))]


def _is_named(value: Any) -> bool:
    """Whether this is an image that a row names instead of holding it."""
    return isinstance(value, dict) and value.get("bytes", 0) is None and isinstance(value.get("path"), str)
