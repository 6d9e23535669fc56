"""What is true of a model, compared with what was declared -> findings.

It reads, and changes nothing.
"""
