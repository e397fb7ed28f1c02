"""The rewards that come along, each a plain function as a user would write it. docs/rewards.md lists them."""
