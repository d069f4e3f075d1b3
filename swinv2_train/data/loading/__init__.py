"""Which image when, and by whom: order, batches, worker processes."""
