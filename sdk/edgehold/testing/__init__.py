"""Fakes and fixtures that every test uses, written once."""
