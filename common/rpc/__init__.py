"""gRPC plumbing that both sides share: servers, channels, and what happens around each call."""
