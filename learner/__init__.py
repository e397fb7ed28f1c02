"""Asks actors for rollouts, trains on them, and sends new weights back."""

import common as common  # repairs torchvision before anything imports it
