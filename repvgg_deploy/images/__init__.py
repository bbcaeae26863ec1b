"""Pictures: decoded, prepared for a net, and drawn."""
