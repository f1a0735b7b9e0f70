"""Spectral complex autoencoder pruning (SCAP, arXiv 2601.09352)."""
