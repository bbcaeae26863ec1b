"""Throughput and latency, measured turn by turn, recorded and reported."""
