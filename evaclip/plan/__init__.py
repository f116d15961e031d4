"""What a training run will need, before a GPU is rented: memory, operations, time, and what each saving is worth."""
