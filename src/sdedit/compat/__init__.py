"""Other names for what lives elsewhere: a table of import paths, and the finder that reads it."""
