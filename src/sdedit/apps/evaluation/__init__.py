"""SDEdit's curve: how real and how faithful pictures are as strength rises."""
