"""What the server answers: one servicer for each service of the proto files."""
