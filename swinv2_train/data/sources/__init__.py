"""Where images come from: shards, folders, saved data sets, pipes; each offers the same few methods."""
