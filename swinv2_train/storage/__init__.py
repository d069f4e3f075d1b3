"""Bytes on disk, complete or absent, and tensors read one at a time.  Knows files and torch alone."""
