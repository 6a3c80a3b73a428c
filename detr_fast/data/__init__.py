"""Images and targets: COCO-format files, the embedded data set, transforms, batches."""
