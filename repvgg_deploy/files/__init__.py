"""Files: written as one set, told apart, read into typed values; nothing here knows what a net is."""
