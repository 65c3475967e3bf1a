"""What accelerators can do; knows nothing of models."""
