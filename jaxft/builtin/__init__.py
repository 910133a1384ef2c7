"""A small model, and pictures to train it on, that come with jaxft."""
