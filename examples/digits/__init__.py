"""The embedded task: a tiny vision-language model learns to read handwritten digits. See README.md beside this file."""
