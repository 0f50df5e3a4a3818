"""Helpers of the Makefile and of the tests; no part of the package."""
