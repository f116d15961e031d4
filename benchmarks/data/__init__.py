"""How fast shards are read, and how well they are mixed, beside the webdataset library where it is installed."""
