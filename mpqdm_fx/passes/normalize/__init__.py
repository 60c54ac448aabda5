"""Passes that make a traced graph plain before anything is quantized."""
