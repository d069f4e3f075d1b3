"""DeepSpeed behind the engine protocol: its configuration, its traps and where it keeps its state."""
