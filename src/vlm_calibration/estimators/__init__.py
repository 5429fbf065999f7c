"""From a model's answer to a confidence in it: what it states, what it believes, and how often it would say so again."""
