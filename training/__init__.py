"""Around the training loop: what a run is made of, what it leaves behind, and what watches over it."""
