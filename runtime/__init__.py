"""What emitted training programs use; a copy of this folder stands beside each of them."""
