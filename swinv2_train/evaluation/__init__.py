"""What a model is worth: scores of whole splits, confusion matrices, and probes of the frozen encoder.

Knows tasks and data, but no engine: what computes is handed in as a function.
"""
