"""Images, from a name to batches."""
