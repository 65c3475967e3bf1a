"""Reads PyTorch models and prices them on a GPU roofline."""
