"""From a configuration to a trained model: building a run, and the loop.

Knows every package but planning and the commands.
"""
