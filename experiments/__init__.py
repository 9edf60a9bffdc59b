"""Programs that make evidence: studies, planted bugs, measurements of speed, gradients and critics."""
