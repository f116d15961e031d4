"""What other libraries offer, under their names and with their signatures, on this library's ops."""
