"""What a run tells: the terminal, metrics.jsonl and completions.jsonl, Prometheus, trackers, its summary."""
