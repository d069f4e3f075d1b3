"""What a configuration needs before it runs: memory by part, time of a step, and which setting fits.

The activations are not estimated: the real model runs on the meta device, where tensors have sizes and no contents.
"""
