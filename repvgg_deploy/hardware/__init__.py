"""What the machine has: CPU and GPUs."""
