"""Engines: how parameters, gradients and optimizer states are held, summed and updated."""
