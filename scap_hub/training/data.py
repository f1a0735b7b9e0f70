"""The dataset argument: from whatever the user has to loaders of image batches."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HTTPError
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.transforms.v2 import functional as transforms

from scap_hub.errors import DataError
from scap_hub.private import column_types
from scap_hub.recipe import DataSettings
from scap_hub.training.distributed import main_first
from scap_hub.zoo.base import Preprocessing, one_line
from scap_hub.zoo.remote import refusals

if TYPE_CHECKING:
    import datasets

DIGITS = Path(__file__).parents[1] / "data" / "digits"
VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
VALIDATION_SHARE = 0.1
MEMORY_LIMIT = 512 * 2**20
"""Bytes of decoded images that are kept instead of being decoded again."""

Batch = tuple[Tensor, ...]


@dataclass
class Data:
    """Loaders of (images, labels) batches, or of (images,) where the data has no labels.

    Images are float32 (N, C, H, W) as the model wants them, labels int64 (N,).

    Attributes:
        train: Shuffled and augmented training images.
        validation: Images that decide on the best weights: a split of the data, or else a fixed tenth of the training
            images; None where there are no labels.
        calibration: A fixed subset of the training images in a fixed order, not augmented.
        labels: Class names by index, None where unknown.
        name: What the data set is called.
        test: Images that nothing is decided on; None where the data has no such split.
    """

    train: DataLoader
    validation: DataLoader | None
    calibration: DataLoader
    labels: list[str] | None
    name: str
    test: DataLoader | None = None


def load_data(
    dataset: Any,
    preprocessing: Preprocessing,
    settings: DataSettings | None = None,
    *,
    num_classes: int = 0,
    new_head: bool = False,
    seed: int = 0,
) -> Data:
    """Reads a data set into loaders.

    Args:
        dataset: "digits" (embedded), Hub id, image folder, parquet file or folder, save_to_disk folder,
            `datasets.Dataset` or `DatasetDict`, or a torch DataLoader, used as it is; a dict of split name to
            DataLoader too. None stands for `settings.dataset`.
        preprocessing: How the model wants its images.
        settings: The recipe's `data` block.
        num_classes: Width of the classifier, to check the labels against; 0 checks nothing.
        new_head: Whether the classifier will be replaced where the data names another number of classes.
        seed: Chooses the calibration images.

    Raises:
        DataError: The data cannot be found or read, its columns are unclear, or a label is outside the range.
    """
    settings = settings or DataSettings()
    source = settings.dataset if dataset is None else dataset
    if source is None:
        raise DataError("no data set; pass dataset=... or set data.dataset in the recipe")
    if isinstance(source, DataLoader):
        source = {"train": source}
    if isinstance(source, Mapping) and source and all(isinstance(split, DataLoader) for split in source.values()):
        return _from_loaders(source, settings, num_classes, seed)
    if isinstance(source, (str, Path)):
        name = str(source)
        splits = main_first(lambda: _open(name, settings))
    else:
        splits = _as_splits(source)
        name = next(iter(splits.values())).info.dataset_name or "custom"
    return _from_splits(splits, name, preprocessing, settings, num_classes, new_head, seed)


def _open(name: str, settings: DataSettings) -> dict[str, Any]:
    """Splits of a named data set."""
    import datasets
    import pyarrow.parquet

    if name == "digits":
        return {
            split: datasets.Dataset(pyarrow.parquet.read_table(DIGITS / f"{split}.parquet"))
            for split in ("train", "test")
        }
    path = Path(name).expanduser()
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _as_splits(datasets.load_from_disk(str(path)))
        if path.suffix == ".parquet" and path.is_file():
            return _as_splits(datasets.load_dataset("parquet", data_files=str(path), streaming=settings.streaming))
        revision = None if path.exists() else settings.revision
        if not path.exists():
            if path.is_absolute() or name.startswith(("~", ".")):
                raise DataError(f"no data set {name!r}: there is no such file or folder")
            _ask_hub(name, revision)
        return _as_splits(datasets.load_dataset(name, revision=revision, streaming=settings.streaming))
    except (
        OSError,
        ValueError,
        datasets.exceptions.DatasetsError,
        datasets.exceptions.DatasetGenerationError,
    ) as error:
        where = "as a folder" if path.exists() else "on the Hub, and there is no such folder"
        raise DataError(f"data set {name!r} cannot be loaded {where}: {' '.join(str(error).split())}") from error


def _ask_hub(name: str, revision: str | None) -> None:
    """One quick question: `datasets` repeats a refused connection for 23 s."""
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


def _as_splits(source: Any) -> dict[str, Any]:
    import datasets

    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        return {str(source.split or "train"): source}
    if isinstance(source, Mapping) and source:
        return dict(source)
    raise DataError(
        "a data set is a name, a folder, a datasets.Dataset or DatasetDict, or a DataLoader, "
        f"not {type(source).__name__}"
    )


def _choose(splits: Mapping[str, Any], asked: str | None, usual: Sequence[str], what: str) -> str | None:
    """Name of the split to use: the one asked for, or the first of the usual ones that is there."""
    if asked is not None and asked not in splits:
        raise DataError(f"no split {asked!r} for {what}; the data set has {', '.join(splits)}")
    return asked or next((name for name in usual if name in splits), None)


def _from_splits(
    splits: Mapping[str, Any],
    name: str,
    preprocessing: Preprocessing,
    settings: DataSettings,
    num_classes: int,
    new_head: bool,
    seed: int,
) -> Data:
    train = _choose(splits, settings.train_split, ("train", *(splits if len(splits) == 1 else ())), "training")
    if train is None:
        raise DataError(f"which split of {name!r} to train on? It has {', '.join(splits)}; set data.train_split")
    validation = _choose(splits, settings.validation_split, VALIDATION_SPLITS, "validation")
    test = _choose(splits, settings.test_split, ("test",), "testing")
    image, label = _columns(splits[train], name, settings)
    names = getattr(column_types(splits[train])[label], "names", None) if label else None
    if names and num_classes and len(names) != num_classes:
        if not new_head:
            raise DataError(
                f"{name!r} has {len(names)} classes, the classifier {num_classes}: set finetune.dense_epochs, which "
                "gives the model a new head and tunes it first, or data.labels=false to use the images without labels"
            )
        num_classes = len(names)
    reader = _Reader(name, image, label, preprocessing, num_classes)

    whole = reader.read(splits[train], train)
    final = reader.read(splits[test], test) if test else None
    held_out: _Source | Subset | None = reader.read(splits[validation], validation) if validation else None
    training: _Source | Subset = whole
    if isinstance(whole, _Stream):
        training = whole.shuffled(seed)
        sample = training.first(settings.calibration_images)
        calibration: Dataset = sample
    else:
        # The split does not depend on the seed, so that runs with several seeds can be compared.
        order = np.random.default_rng(0).permutation(len(whole))
        spared = round(VALIDATION_SHARE * len(whole)) if validation is None and whole.labelled else 0
        if spared:
            held_out = Subset(whole, order[:spared].tolist())
        training = Subset(whole, order[spared:].tolist())
        chosen = np.random.default_rng(seed).permutation(order[spared:])[: settings.calibration_images]
        calibration = Subset(whole, chosen.tolist())
        sample = whole
    finish = functools.partial(_finish, mean=preprocessing.mean, std=preprocessing.std)
    mirror = settings.augmentation == "crop-flip" or (settings.augmentation == "auto" and sample.in_colour())
    augment = functools.partial(finish, shift=settings.augmentation != "none", mirror=mirror)

    def loader(images: Dataset, collate: Callable = finish, shuffle: bool = False) -> DataLoader:
        streamed = isinstance(images, IterableDataset)
        return DataLoader(
            images,
            batch_size=settings.batch_size,
            shuffle=shuffle and not streamed,
            collate_fn=collate,
            num_workers=_workers(images) if settings.workers is None else settings.workers,
            # A last batch of one image would break batch norm.
            drop_last=shuffle and (streamed or len(images) > settings.batch_size),  # type: ignore[arg-type]
            pin_memory=torch.cuda.is_available(),
        )

    return Data(
        train=loader(training, augment, shuffle=True),
        validation=loader(held_out) if held_out is not None and _labelled(held_out) else None,
        calibration=loader(calibration),
        labels=names if whole.labelled else None,
        name=name,
        test=loader(final) if final is not None and final.labelled else None,
    )


def _from_loaders(loaders: Mapping[str, DataLoader], settings: DataSettings, num_classes: int, seed: int) -> Data:
    train = _choose(loaders, settings.train_split, ("train", *(loaders if len(loaders) == 1 else ())), "training")
    if train is None:
        raise DataError(f"which of the loaders {', '.join(loaders)} to train on? Name it 'train'")
    validation = _choose(loaders, settings.validation_split, VALIDATION_SPLITS, "validation")
    test = _choose(loaders, settings.test_split, ("test",), "testing")
    batches: list[Batch] = []
    count = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for batch in loaders[train]:
            batches.append(_checked(batch, num_classes))
            count += len(batches[-1][0])
            if count >= settings.calibration_images:
                break
    if not batches:
        raise DataError(
            "the DataLoader has no batches: it is empty, or it drops a last batch that is all there is; "
            "lower its batch_size"
        )
    images = TensorDataset(*(torch.cat(column)[: settings.calibration_images] for column in zip(*batches, strict=True)))
    return Data(
        train=loaders[train],
        validation=loaders[validation] if validation else None,
        calibration=DataLoader(images, batch_size=settings.batch_size, collate_fn=_as_batch),
        labels=None,
        name="DataLoader",
        test=loaders[test] if test else None,
    )


def _checked(batch: Any, num_classes: int) -> Batch:
    """A user's batch as a tuple."""
    parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    if len(parts) > 2 or not all(isinstance(part, Tensor) for part in parts) or parts[0].ndim != 4:
        raise DataError(
            "a DataLoader must yield (images, labels) or (images,) tuples of tensors, images (N, C, H, W); "
            f"this one yields {type(batch).__name__}"
        )
    if len(parts) == 2:
        _check_labels(parts[1].numpy(force=True), num_classes, "the DataLoader")
    return parts


def _check_labels(labels: np.ndarray, num_classes: int, where: str) -> None:
    if num_classes and len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        value = labels.min() if labels.min() < 0 else labels.max()
        raise DataError(
            f"label {value} in {where} is outside the classifier's range 0..{num_classes - 1}; for a new "
            "classifier set model.num_classes and finetune.dense_epochs"
        )


def _columns(rows: Any, name: str, settings: DataSettings) -> tuple[str, str | None]:
    """The image and label columns, by type unless named."""
    import datasets

    features = column_types(rows)
    kinds = {column: getattr(feature, "dtype", type(feature).__name__) for column, feature in features.items()}
    kinds |= {c: type(f).__name__ for c, f in features.items() if isinstance(f, (datasets.Image, datasets.ClassLabel))}
    listing = f"the columns of {name!r} are {', '.join(f'{column} ({kind})' for column, kind in kinds.items())}"
    for asked in (settings.image_column, settings.label_column):
        if asked is not None and asked not in features:
            raise DataError(f"no column {asked!r}; {listing}")

    images = [column for column, kind in kinds.items() if kind == "Image"]
    if settings.image_column is None and len(images) != 1:
        raise DataError(f"{len(images) or 'no'} image columns; {listing}; set data.image_column")
    image = settings.image_column or images[0]
    if not settings.labels:
        return image, None
    labels = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    if not labels:
        labels = [column for column in ("label", "labels") if kinds.get(column, "").startswith(("int", "uint"))]
    if settings.label_column is None and len(labels) > 1:
        raise DataError(f"{len(labels)} label columns; {listing}; set data.label_column")
    label = settings.label_column or (labels[0] if labels else None)
    if label is not None and not kinds[label].startswith(("ClassLabel", "int", "uint")):
        raise DataError(
            f"column {label!r} holds {kinds[label]}, not class labels; {listing}; see Dataset.class_encode_column"
        )
    return image, label


@dataclass(frozen=True)
class _Reader:
    """Turns rows of a data set into uint8 images (C, H, W) and integer labels."""

    name: str
    image: str
    label: str | None
    preprocessing: Preprocessing
    num_classes: int

    def read(self, rows: Any, split: str) -> _Source:
        import datasets

        where = f"{self.name}[{split}]"
        label = self.label if self.label in column_types(rows) else None
        rows = rows.with_format(None).select_columns([self.image, *([label] if label else [])])
        # Decoding is ours, so that a broken image can be named.
        rows = rows.cast_column(self.image, datasets.Image(decode=False))
        return (_Images if isinstance(rows, datasets.Dataset) else _Stream)(rows, where, label, self)

    def open(self, row: Mapping[str, Any], where: str) -> Image.Image:
        import datasets

        try:
            return datasets.Image().decode_example(row[self.image])
        except (OSError, TypeError, ValueError) as error:
            raise DataError(f"an image of {where} cannot be read: {error}") from error

    def pixels(self, row: Mapping[str, Any], where: str) -> Tensor:
        channels, height, width = self.preprocessing.input_size
        image = self.open(row, where).convert("L" if channels == 1 else "RGB")
        resampling = Image.Resampling[self.preprocessing.interpolation.upper()]
        # Resizing so that the crop is `crop_pct` of it, then cropping, is cropping that share and resizing it.
        border = (1 - self.preprocessing.crop_pct) / 2
        if self.preprocessing.crop_mode == "squash":
            left, top = border * image.width, border * image.height
            image = image.resize((width, height), resampling, (left, top, image.width - left, image.height - top))
        else:
            image = ImageOps.fit(image, (width, height), method=resampling, bleed=border)
        return torch.from_numpy(np.array(image)).reshape(height, width, channels).permute(2, 0, 1)


class _Images(Dataset):
    """Images by index; decoded once where all of them fit in memory."""

    def __init__(self, rows: datasets.Dataset, where: str, label: str | None, reader: _Reader) -> None:
        if len(rows) == 0:
            raise DataError(f"{where} has no images")
        self.rows, self.where, self.reader = rows, where, reader
        self.labels: Tensor | None = None
        if label is not None:
            labels = rows.select_columns(label).with_format("numpy")[:][label]
            if labels.dtype.kind not in "iu":
                raise DataError(f"column {label!r} of {where} has rows without a label")
            # Public test sets hide their labels as -1.
            if not (labels == -1).all():
                _check_labels(labels, reader.num_classes, where)
                self.labels = torch.from_numpy(labels.astype(np.int64))
        size = (len(rows), *reader.preprocessing.input_size)
        self.cache = torch.empty(size, dtype=torch.uint8) if np.prod(size, dtype=np.int64) <= MEMORY_LIMIT else None
        self.cached = np.zeros(len(rows), dtype=bool)

    @property
    def labelled(self) -> bool:
        return self.labels is not None

    def in_colour(self) -> bool:
        return self.reader.open(self.rows[0], self.where).mode not in ("1", "L", "LA", "I", "I;16", "F")

    def __len__(self) -> int:
        return len(self.rows)

    def _decode(self, indices: Sequence[int]) -> Tensor:
        column = self.rows[indices][self.reader.image]
        return torch.stack([self.reader.pixels({self.reader.image: image}, self.where) for image in column])

    def __getitem__(self, index: int) -> Batch:
        return tuple(column[0] for column in self.__getitems__([index]))

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch, which torch's loaders ask for: (N, C, H, W) uint8 and, if known, (N,) int64."""
        if self.cache is None:
            images = self._decode(indices)
        else:
            missing = [index for index in indices if not self.cached[index]]
            if missing:
                self.cache[missing] = self._decode(missing)
                self.cached[missing] = True
            images = self.cache[indices]
        return (images,) if self.labels is None else (images, self.labels[indices])


class _Stream(IterableDataset):
    """Images as they come."""

    def __init__(self, rows: datasets.IterableDataset, where: str, label: str | None, reader: _Reader) -> None:
        self.rows, self.where, self.label, self.reader = rows, where, label, reader

    @property
    def labelled(self) -> bool:
        return self.label is not None

    def shuffled(self, seed: int) -> _Stream:
        return _Stream(self.rows.shuffle(seed=seed, buffer_size=1000), self.where, self.label, self.reader)

    def first(self, count: int) -> _Images:
        """Keeps the first images in memory."""
        import datasets

        rows = datasets.Dataset.from_list(list(self.rows.take(count)), features=column_types(self.rows))
        return _Images(rows, self.where, self.label, self.reader)

    def set_epoch(self, epoch: int) -> None:
        self.rows.set_epoch(epoch)

    def __len__(self) -> int:
        known = (self.rows.info.splits or {}).get(str(self.rows.split))
        if known is None or not known.num_examples:
            raise TypeError(f"{self.where} does not say how many images it has")
        return known.num_examples

    def __iter__(self) -> Iterator[Batch]:
        for row in self.rows:
            labels = () if self.label is None else (torch.tensor(row[self.label]),)
            for label in labels:
                _check_labels(label.numpy()[None], self.reader.num_classes, self.where)
            yield (self.reader.pixels(row, self.where), *labels)


_Source = _Images | _Stream


def _labelled(images: _Source | Subset) -> bool:
    return images.dataset.labelled if isinstance(images, Subset) else images.labelled  # type: ignore[attr-defined]


def _workers(images: Dataset) -> int:
    base = images.dataset if isinstance(images, Subset) else images
    if getattr(base, "cache", None) is not None:
        return 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(8, (os.cpu_count() or 1) // here))


def _as_batch(samples: list[Batch] | Batch) -> Batch:
    """A tuple of tensors from what a data set gives: a ready batch, or a list of samples."""
    if isinstance(samples, tuple):
        return samples
    return tuple(torch.stack(column) for column in zip(*samples, strict=True))


def _finish(
    samples: list[Batch] | Batch,
    mean: Sequence[float],
    std: Sequence[float],
    shift: bool = False,
    mirror: bool = False,
) -> Batch:
    """Augments a uint8 batch if asked, and normalises it."""
    images, *labels = _as_batch(samples)
    if shift:
        images = augment(images, mirror)
    images = transforms.to_dtype(images, torch.float32, scale=True)
    return (transforms.normalize(images, list(mean), list(std)), *labels)


def augment(images: Tensor, mirror: bool) -> Tensor:
    """Shifts each image by up to an eighth of its size, repeating the border, and mirrors every other one."""
    count, channels, height, width = images.shape

    def moved(size: int) -> Tensor:
        reach = size // 8
        return (torch.arange(size) + torch.randint(-reach, reach + 1, (count, 1))).clamp(0, size - 1)

    rows, columns = moved(height), moved(width)
    if mirror:
        columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    which, channel = torch.arange(count)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    return images[which, channel, rows[:, None, :, None], columns[:, None, None, :]]
