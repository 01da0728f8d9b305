"""Training LoRAs: a data set, the gradients of factors laid over a frozen transformer, and the steps."""
