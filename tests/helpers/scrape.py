"""Reads the metrics of a process as Prometheus does."""

import urllib.request


def scrape(port: int) -> dict[str, float]:
    """Samples by name and labels, as they stand in the text format."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}
