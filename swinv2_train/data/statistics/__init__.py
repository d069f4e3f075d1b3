"""Statistics of bands over all images of a source: exact, and the same bits for any number of ranks and workers."""
