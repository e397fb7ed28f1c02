"""What every process of Outrider needs for itself: its signals, threads, memory and output."""
