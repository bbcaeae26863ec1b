"""Fusing: each RepVGG block becomes one convolution with the same output."""
