"""A model trained on the emoji drawings that PyPI packages carry, from the images to the report."""
