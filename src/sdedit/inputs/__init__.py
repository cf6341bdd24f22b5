"""What comes in: pictures, prompts, masks and arguments, checked and made into tensors."""
