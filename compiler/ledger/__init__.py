"""What memory holds at the peak of each distinct rank, tensor by tensor, down to operators."""
