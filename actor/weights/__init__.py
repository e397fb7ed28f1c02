"""Which policy this actor serves, and how the next one comes in beside it."""
