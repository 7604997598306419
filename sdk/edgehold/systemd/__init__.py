"""What a daemon says to, and is given by, the service manager."""
