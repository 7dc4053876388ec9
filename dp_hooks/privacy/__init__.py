"""What makes it private: sampling, clipping, noise, accounting; one mechanism per file."""
