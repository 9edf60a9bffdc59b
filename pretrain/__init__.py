"""Language model, reward model and the tiny offline world, trained from texts."""
