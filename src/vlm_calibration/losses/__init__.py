"""Pure functions from token logits to losses."""
