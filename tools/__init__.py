"""What is run beside training: making models, the self-audit, pictures."""
