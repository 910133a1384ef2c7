"""Weights as other programs store them."""
