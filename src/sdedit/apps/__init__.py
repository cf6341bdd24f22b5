"""What people do with a pipeline: sweeps, searches, composites, stroke paintings, curves, fine-tuning."""
