"""`evaclip doctor`: what is installed, which backends are live, and why others are not."""
