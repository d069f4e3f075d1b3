"""The tests: support/ is shared, unit/ mirrors the package, the others are named for what they need."""
