"""What a model would do on a GPU, without one: `sparsed plan`."""
