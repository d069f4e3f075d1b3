"""Data: shards and their index, the global sample order, decoding, crops, masks, and the loaders.

The only package that knows webdataset.  It never touches torch.distributed: callers pass ``rank`` and ``world_size``.
"""
