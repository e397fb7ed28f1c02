"""What requests may ask for: each refusal names its field."""
