"""Boxes and masks as people keep them: COCO json, Pascal VOC xml, YOLO txt and labelme json, read into one form."""
