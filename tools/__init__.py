"""What is run beside training: making models, pictures, checks."""
