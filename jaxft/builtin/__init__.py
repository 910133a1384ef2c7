"""A small model, and pictures to train it on: what the demo and the first minute need."""
