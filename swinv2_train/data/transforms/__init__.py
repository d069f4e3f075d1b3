"""One image: decoded, cropped, augmented, masked."""
