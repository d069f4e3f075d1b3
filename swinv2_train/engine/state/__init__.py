"""An engine's state at rest: sharded files, whole tensors out of them, and averages of weights.  Knows no engine."""
