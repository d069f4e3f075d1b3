"""Packed images: tars, their index and manifest, here or at an address."""
