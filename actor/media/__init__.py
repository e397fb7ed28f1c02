"""Images and videos on their way in: sent whole or by their hash, checked, stored, decoded once."""
