"""What several test modules share: small nets, simulated devices, records."""
