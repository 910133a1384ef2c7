"""The mathematics of diffusion: noise schedules, losses, samplers."""
