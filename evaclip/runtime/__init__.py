"""Models at work: images and texts to embeddings, a store of them, and the search in it."""
