"""What comes in from anywhere: the right pixels, or a refusal with a reason; never something in between."""

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from makers import drawing, encoded
from PIL import Image, features

from interlace.data.check import check
from interlace.data.pictures import BadPicture, open_picture, to_rgb
from interlace.data.rows import Picture
from interlace.data.sources import open_source

HEIC_HEADER = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(100)


def pixels(ref, **options):
    image = open_picture(ref, **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def refused(ref, **options) -> str:
    with pytest.raises(BadPicture) as caught:
        open_picture(ref, **options)
    assert len(caught.value.reason) < 120
    return caught.value.reason


def test_exif_orientation_is_applied():
    picture = Image.new("RGB", (40, 20), "white")
    picture.paste("red", (0, 0, 20, 20))  # left half red
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise: left becomes top
    seen = pixels(encoded(picture, "JPEG", exif=exif, quality=95))
    assert seen.shape == (40, 20, 3)
    assert seen[5, 10, 1] < 60 and seen[35, 10, 1] > 200


def test_cmyk_comes_out_in_its_colours():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, full magenta and yellow: red
    assert np.abs(pixels(encoded(cmyk, "JPEG", quality=95))[8, 8] - (255, 0, 0)).max() < 40
    assert pixels(encoded(cmyk, "TIFF"))[8, 8].tolist() == [255, 0, 0]


def test_16_bit_grey_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    seen = pixels(encoded(Image.fromarray(ramp), "PNG"))[:, :, 0]
    assert np.abs(seen - ramp / 257).max() <= 0.5
    assert seen.max() == 255 and 120 < np.median(seen) < 135  # a clipped ramp is 255 nearly everywhere
    assert np.abs(pixels(encoded(Image.fromarray(ramp), "TIFF"))[:, :, 0] - ramp / 257).max() <= 0.5


def test_float_and_wide_integer_pictures_use_their_own_range():
    ramp = np.linspace(-2, 3, 32 * 32, dtype=np.float32).reshape(32, 32)
    seen = np.asarray(to_rgb(Image.fromarray(ramp)))
    assert (seen.min(), seen.max()) == (0, 255)


def test_transparency_is_white_in_every_mode():
    rgba = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    rgba.paste((0, 0, 255, 255), (0, 0, 4, 8))
    rgba.putpixel((6, 6), (0, 0, 0, 128))
    seen = pixels(encoded(rgba, "PNG"))
    assert seen[0, 0].tolist() == [0, 0, 255] and seen[0, 7].tolist() == [255, 255, 255]
    assert 120 <= seen[6, 6, 0] <= 135
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((3, 3), 1)
    seen = pixels(encoded(palette, "PNG", transparency=0))
    assert seen[0, 0].tolist() == [255, 255, 255] and seen[3, 3].tolist() == [200, 100, 50]
    assert pixels(encoded(palette, "PNG"))[0, 0].tolist() == [10, 20, 30]
    grey = Image.new("LA", (4, 4), (0, 0))
    assert pixels(encoded(grey, "PNG"))[0, 0].tolist() == [255, 255, 255]
    keyed = Image.new("RGB", (4, 4), (1, 2, 3))
    assert pixels(encoded(keyed, "PNG", transparency=(1, 2, 3)))[0, 0].tolist() == [255, 255, 255]


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert pixels(data)[4, 4].tolist() == [255, 0, 0], kind


@pytest.mark.parametrize("kind", ["WEBP", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_other_formats(kind):
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow is built without {kind}")
    picture = drawing(3)
    assert np.abs(pixels(encoded(picture, kind)) - np.asarray(picture).astype(int)).mean() < 6


def test_one_bit_and_one_pixel():
    assert pixels(encoded(Image.new("1", (9, 9), 1)))[0, 0].tolist() == [255, 255, 255]
    assert pixels(encoded(Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1, 2, 3]]]
    assert pixels(encoded(Image.new("RGB", (1, 1), (1, 2, 3))), size_hint=224).shape == (1, 1, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("hint", [None, 16])
def test_truncated_files_are_refused(kind, hint):
    data = encoded(Image.effect_noise((256, 256), 90).convert("RGB"), kind)
    reason = refused(data[: len(data) // 2], size_hint=hint)
    assert "truncated" in reason or "broken" in reason


def test_what_is_no_picture(tmp_path):
    assert refused(b"") == "empty file"
    assert refused(b"\n<!DOCTYPE html><html><body>404</body></html>") == "not a picture (HTML)"
    assert refused(b'{"error": "rate limit"}') == "not a picture (JSON)"
    assert "SVG" in refused(b'<?xml version="1.0"?><svg/>')
    assert "Git LFS" in refused(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "unknown format" in refused(b"hello, this is a text file")
    assert "zeros" in refused(bytes(1000))
    assert refused(tmp_path / "gone.jpg") == "missing file"
    assert refused(tmp_path) == "a folder, not a file"
    page = tmp_path / "page.jpg"
    page.write_text("<html></html>")
    assert refused(page) == "not a picture (HTML)"


def test_scripts_for_a_page_printer_are_not_run():
    assert "unknown format" in refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")


def png_header(width: int, height: int) -> bytes:
    """A 1-bit PNG that claims a size and holds almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_bombs_are_refused_from_their_header():
    assert refused(png_header(30_000, 30_000)) == "too many pixels (900 Mpx > 64 Mpx)"
    assert refused(png_header(12_000, 12_000)) == "too many pixels (144 Mpx > 64 Mpx)"
    assert refused(encoded(drawing(0)), max_pixels=1000).startswith("too many pixels")
    assert "truncated" in refused(png_header(1000, 1000)) or "broken" in refused(png_header(1000, 1000))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_size_hint_saves_pixels_but_not_too_many(kind):
    large = drawing(5, side=1200).resize((1600, 1200))
    full, small = open_picture(encoded(large, kind)), open_picture(encoded(large, kind), size_hint=100)
    assert full.size == (1600, 1200)
    assert 200 <= min(small.size) < 420 and small.size[0] / small.size[1] == pytest.approx(4 / 3, abs=0.02)
    difference = np.asarray(full.resize((40, 30)), int) - np.asarray(small.resize((40, 30)), int)
    assert np.abs(difference).mean() < 3
    assert open_picture(encoded(drawing(5), kind), size_hint=224).size == (48, 48)


def test_every_way_to_name_a_picture(tmp_path):
    data = encoded(drawing(1))
    file = tmp_path / "a.png"
    file.write_bytes(data)
    pack = tmp_path / "pack.bin"
    pack.write_bytes(b"before" + data + b"after")
    expected = np.asarray(drawing(1))
    refs = [
        file,
        str(file),
        data,
        Picture(path=str(file)),
        Picture(data=data),
        Picture(path=str(pack), offset=6, length=len(data)),
    ]
    for ref in refs:
        assert np.array_equal(pixels(ref), expected)
    assert "ends before" in refused(Picture(path=str(pack), offset=6, length=10**6))


def heic(picture: Image.Image, orientation: int = 1) -> bytes:
    """As phones write it: the turn stands twice, in the file's own `irot` and in EXIF."""
    import pillow_heif

    pillow_heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture, "HEIF", quality=95, exif=exif.tobytes())


def test_heic_has_its_colours_and_is_turned_once():
    flat = np.asarray(drawing(2, side=64)).astype(int)
    assert np.abs(pixels(heic(drawing(2, side=64))) - flat).mean() < 8
    picture = Image.new("RGB", (80, 40), "white")
    picture.paste("red", (0, 0, 40, 40))  # left half red
    turned = heic(picture, orientation=6)  # clockwise by 90 degrees: left becomes top
    assert b"irot" in turned and b"irot" not in heic(picture)
    for hint in (None, 10):
        seen = pixels(turned, size_hint=hint)
        high, wide = seen.shape[:2]
        assert high == 2 * wide and seen[high // 8, wide // 2, 1] < 60 and seen[-high // 8, wide // 2, 1] > 200


def test_broken_heic_is_refused_like_the_others():
    whole = heic(Image.effect_noise((256, 256), 90).convert("RGB"))
    for part in (whole[: len(whole) // 2], HEIC_HEADER):
        assert "truncated" in (reason := refused(part)) or "broken" in reason or "unknown format" in reason
    assert refused(heic(drawing(0)), max_pixels=1000).startswith("too many pixels")


def test_heic_in_a_table(tmp_path):
    rows = ["image,caption"]
    for n in range(12):
        (tmp_path / f"{n}.heic").write_bytes(heic(drawing(n, side=64), orientation=6 if n % 2 else 1))
        rows.append(f"{n}.heic,picture {n}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    source = open_source(tmp_path)
    assert len(source) == 12
    for n in range(12):
        picture = drawing(n, side=64)
        upright = picture.transpose(Image.Transpose.ROTATE_270) if n % 2 else picture
        seen = pixels(source.pair(n).picture)
        assert np.abs(seen - np.asarray(upright).astype(int)).mean() < 8
    report = check(source)
    assert not report.unreadable and report.exit_status == 0

    program = """
import sys
sys.modules["pillow_heif"] = None  # as where the extra is not installed
from interlace.data.check import check
report = check(sys.argv[1])
print(sorted({reason for _, reason in report.unreadable}), len(report.unreadable))
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "['HEIC, which needs `pip install interlace[heic]`'] 12", done.stderr


def test_the_caller_owns_the_pixels(tmp_path):
    file = tmp_path / "a.png"
    drawing(1).save(file)
    image = open_picture(file)
    file.unlink()
    image.putpixel((0, 0), (1, 2, 3))
    assert image.getpixel((0, 0)) == (1, 2, 3)
