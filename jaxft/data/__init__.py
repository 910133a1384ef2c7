"""From a folder of captioned images to batches."""
