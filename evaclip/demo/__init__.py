"""A model trained on the emoji drawings that PyPI packages carry, from the pictures to the report."""
