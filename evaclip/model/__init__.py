"""The model: configurations, the two towers, and their cost."""
