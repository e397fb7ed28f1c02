"""Rows of a data set, from files or a Python function, and the prompts that they make."""
