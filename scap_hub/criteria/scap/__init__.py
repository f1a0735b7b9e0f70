"""Spectral complex autoencoder pruning (SCAP, arXiv 2601.09352)."""

from scap_hub.criteria.scap.criterion import Scap
from scap_hub.criteria.scap.scap_set import ScapSet

__all__ = ["Scap", "ScapSet"]
