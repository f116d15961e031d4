"""Models: configurations, image and text towers, and their cost."""
