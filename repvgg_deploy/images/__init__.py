"""Images: decoded, prepared for a net, and synthesized."""
