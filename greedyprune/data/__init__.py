"""The data: what the user gives as data, loss and forward pass, as batches and targets."""
