"""Training LoRAs: a dataset, the gradients of factors added to a frozen transformer, and the steps."""
