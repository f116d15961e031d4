"""Models at work: embeddings of pictures and texts, the store that keeps them, and the search in it."""
