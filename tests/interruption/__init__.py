"""Fits that are killed, stopped or broken off, and what the next fit makes of them."""
