"""Compress the vision models you already use."""
