"""Mask R-CNN, Cascade Mask R-CNN and HTC on SwinV2, with constant shapes.

Whatever an image holds, every module sees as many boxes as of any other image: missing ones are boxes of weight 0.  So
ranks never wait for each other (ZeRO-3 gathers weights module by module), memory is known beforehand, and an image's
loss is a function of that image alone.
"""
