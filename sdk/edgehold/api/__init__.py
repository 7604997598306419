"""The contracts: each daemon's messages, states and asynchronous client."""
