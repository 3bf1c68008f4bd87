"""Training on Fashion-MNIST: configuration, data, the run, and what it leaves."""
