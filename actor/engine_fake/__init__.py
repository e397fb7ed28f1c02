"""The fake engine: `engine` itself, and the `prompts`, `answers` and `updates` that it makes up."""
