"""Measure and see: the device, recorded results."""
