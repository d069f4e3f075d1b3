"""Scripts: each runs as `python scripts/X.py`; tests and other scripts import it as scripts.X."""
