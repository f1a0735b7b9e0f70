"""Data sets: from whatever the user has to loaders of image batches."""

from scap_hub.training.data.loaders import Data, load_data
from scap_hub.training.data.sources import DIGITS
from scap_hub.training.data.transforms import augment

__all__ = ["DIGITS", "Data", "augment", "load_data"]
