"""A checkpoint directory and parquet files in verl's columns: the files of a task that needs no code."""
