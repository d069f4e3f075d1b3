"""What a person looks at: the page of a run, its charts and pictures.

Reads a run directory and knows no engine or model.
"""
