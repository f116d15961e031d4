"""The command line: one file a verb, which says what to type and calls the library; no module of it imports these."""
