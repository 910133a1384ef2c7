"""Networks of Stable Diffusion with diffusers' and transformers' classes, names and layouts."""
