"""What a run leaves on disk: the folder of runs, checkpoints, exported models."""
