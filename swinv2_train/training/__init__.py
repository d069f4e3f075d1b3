"""From a configuration to a trained model: building a run, and the loop.  Knows every room but the commands."""
