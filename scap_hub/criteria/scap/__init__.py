"""Spectral complex autoencoder pruning (SCAP, arXiv 2601.09352)."""

from scap_hub.criteria.scap.criterion import Scap

__all__ = ["Scap"]
