"""What a trained model looks at: attention recomputed, Grad-CAM, and the page that shows both beside its images.

It knows modules and tasks, and not where weights or images come from.
"""
