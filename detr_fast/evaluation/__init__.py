"""Evaluates detections: COCO metrics and pictures."""
