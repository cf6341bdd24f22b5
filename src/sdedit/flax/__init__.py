"""Image-to-image on JAX and Flax, with the class and argument names of diffusers 0.34; PyTorch is not needed."""
