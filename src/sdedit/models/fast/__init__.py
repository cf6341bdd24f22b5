"""Ways to compute the same with less time or memory, each put into a network and taken out again."""
