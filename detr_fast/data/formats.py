"""File formats by their first bytes: those that are read, and a name for others that people have."""

from PIL import features

READ_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF")
"""Pillow's names. Each is told by its content, and decoded without running other programs."""
START_BYTES = 512
CONVERT = "convert it to JPEG or PNG"
STARTS = {
    b"version https://git-lfs": "a Git LFS pointer instead of the file: git lfs pull fetches it",
    b"%PDF": f"a PDF: {CONVERT}",
    b"8BPS": f"a Photoshop file: {CONVERT}",
    b"\x00\x00\x00\x0cjP  ": f"a JPEG 2000: {CONVERT}",
    b"\xff\x4f\xff\x51": f"a JPEG 2000: {CONVERT}",
    b"\x00\x00\x00\x0cJXL ": f"a JPEG XL: {CONVERT}",
    b"\xff\x0a": f"a JPEG XL: {CONVERT}",
    b"\x76\x2f\x31\x01": f"an OpenEXR image: {CONVERT}",
    b"FUJIFILMCCD-RAW": f"a camera's raw file: {CONVERT}",
    b"FOVb": f"a camera's raw file: {CONVERT}",
    b"\x00\x00\x01\x00": f"an icon: {CONVERT}",
    b"\x1aE\xdf\xa3": "a video: extract its frames as JPEG or PNG",
    b"PK\x03\x04": "an archive: unpack it",
    b"\x1f\x8b": "an archive: unpack it",
}
BOXES = {
    "HEIC": (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
    "AVIF": (b"avif", b"avis"),
    "camera's raw file": (b"crx ",),
}
"""Brands of an ISO media file, whose first box says them; all others are videos."""


def described(start: bytes) -> str | None:
    """Say what a file is by its first `START_BYTES`, and what to do about it; None for what is not known."""
    if not start:
        return "empty"
    if start[4:8] == b"ftyp":
        kind = next((kind for kind, brands in BOXES.items() if start[8:12] in brands), None)
        if kind == "AVIF":
            return "a broken AVIF, or cut off" if features.check("avif") else f"an AVIF, without its decoder: {CONVERT}"
        return f"a {kind}, which is not read: {CONVERT}" if kind else STARTS[b"\x1aE\xdf\xa3"]
    if start[128:132] == b"DICM":
        return f"a DICOM file: {CONVERT}"
    for beginning, description in STARTS.items():
        if start.startswith(beginning):
            return description
    if b"<svg" in start:
        return f"an SVG drawing: {CONVERT}"
    return None
