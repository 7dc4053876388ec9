"""What the audits find, and what they leave alone."""
