"""The sparse FFN: rows of neurons, a request's state, and what chooses the neurons of a prompt or a token."""
