"""What a run says while it works: metrics, log, console, signs of life, stragglers, profiles.

The only package that knows wandb, TensorBoard and tqdm; it is told things and decides nothing.
"""
