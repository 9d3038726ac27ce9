"""What a GPU does with emitted programs: every kernel, the loss, training, what else has landed."""
