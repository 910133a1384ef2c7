"""The stages in which the demo's base model is trained; see `make_demo_base`."""
