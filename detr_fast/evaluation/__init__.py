"""From outputs to detections, COCO metrics and pictures."""
