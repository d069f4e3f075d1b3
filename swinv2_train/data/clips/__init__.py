"""Clips: a sample of many frames, which of them are read, and how they are found in a file."""
