"""Networks: UNet, autoencoders, safety checker."""
