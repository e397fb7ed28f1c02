"""`outrider`: actors and learner together on one machine."""
