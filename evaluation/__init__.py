"""What eval.py computes and shows from its results: estimates, intervals, frontier, second judge, report."""
