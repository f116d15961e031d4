"""That tests of all folders here find `processes`."""
