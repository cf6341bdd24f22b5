"""Files to networks and back."""
