"""The user's own pictures, and downloads."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from distmeta.errors import DataError, StorageError
from distmeta.tasks import files
from distmeta.tasks.files import download
from distmeta.tasks.glyphs import Glyphs
from distmeta.tasks.pictures import character_pixels, folder_of_classes, folder_of_images


def drawing(size: tuple[int, int] = (105, 105), paper: int = 255, ink: int = 0) -> Image.Image:
    """A thick L, a tenth off the edges."""
    picture = Image.new("L", size, paper)
    width, height = size
    draw = ImageDraw.Draw(picture)
    draw.rectangle((width // 4, height // 10, width // 4 + 8, height * 9 // 10), fill=ink)
    draw.rectangle((width // 4, height * 9 // 10 - 8, width * 3 // 4, height * 9 // 10), fill=ink)
    return picture


def pixels_of(picture: Image.Image, path: Path, **options: Any) -> NDArray[np.int64]:
    picture.save(path, **options)
    return character_pixels(path, 28).astype(int)


def test_pictures_of_any_make_come_out_alike(tmp_path: Path) -> None:
    plain = pixels_of(drawing(), tmp_path / "plain.png")
    assert plain.shape == (28, 28) and plain[0, 0] == 0 and plain.max() == 255 and plain[14, 8] == 255
    assert np.array_equal(plain, pixels_of(drawing(paper=0, ink=255), tmp_path / "light on dark.png"))
    assert np.array_equal(plain, pixels_of(drawing(paper=200, ink=60), tmp_path / "faint.png"))
    assert np.array_equal(plain, pixels_of(drawing().convert("1"), tmp_path / "one bit.png"))
    assert np.array_equal(plain, pixels_of(drawing().convert("P"), tmp_path / "palette.png"))
    assert np.array_equal(plain, pixels_of(drawing().convert("RGB"), tmp_path / "colour.bmp"))
    transparent = Image.new("RGBA", (105, 105), (0, 0, 0, 0))
    transparent.putalpha(Image.eval(drawing(), lambda value: 255 - value))
    assert np.array_equal(plain, pixels_of(transparent, tmp_path / "transparent.png"))
    assert np.abs(plain - pixels_of(drawing(), tmp_path / "lossy.jpg", quality=95)).max() < 20


def test_exif_orientation_is_followed(tmp_path: Path) -> None:
    turned = drawing().transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    assert np.array_equal(pixels_of(drawing(), tmp_path / "a.png"), pixels_of(turned, tmp_path / "b.png", exif=exif))


def test_oblong_pictures_are_padded_not_stretched(tmp_path: Path) -> None:
    pixels = pixels_of(drawing((200, 50), paper=180, ink=20), tmp_path / "wide.png")
    assert pixels[:9].max() < 5 and pixels[19:].max() < 5 and pixels[10:18].max() > 200


def save_letters(folder: Path, names: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        drawing(ink=number).save(folder / name)


read = Glyphs().read_image


def test_folders_of_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_letters(tmp_path / "b", ["2.png", "1.png"])
    save_letters(tmp_path / "a", ["3.png"])
    for stray in ("a/.DS_Store", "a/Thumbs.db", "README.md"):
        (tmp_path / stray).write_text("no picture")
    (tmp_path / ".hidden").mkdir()
    with caplog.at_level("WARNING"):
        names, x, y = folder_of_classes(tmp_path, read)
    assert [record.getMessage() for record in caplog.records] == [
        f"1 file is no picture by its name and left out: {tmp_path / stray}" for stray in ("README.md", "a/Thumbs.db")
    ]
    assert names == ["a", "b"] and x.shape == (3, 1, 28, 28) and y.tolist() == [0, 1, 1]
    assert torch.equal(x[0], read(tmp_path / "a" / "3.png"))
    pictures = folder_of_images(tmp_path, read)
    assert [path.name for path in pictures.paths] == ["3.png", "1.png", "2.png"] and pictures.labels == ["a", "b", "b"]
    alone = folder_of_images(tmp_path / "b", read)
    assert [path.name for path in alone.paths] == ["1.png", "2.png"] and alone.labels is None


def make_nothing(folder: Path) -> None:
    """No folder at all."""


def make_file(folder: Path) -> None:
    folder.write_text("")


def make_flat(folder: Path) -> None:
    save_letters(folder, ["1.png"])


def make_empty_class(folder: Path) -> None:
    save_letters(folder / "a", ["1.png"])
    (folder / "b").mkdir()


def make_mixed(folder: Path) -> None:
    save_letters(folder / "a", ["1.png"])
    save_letters(folder, ["stray.png"])


def make_text(folder: Path) -> None:
    save_letters(folder / "a", ["1.png"])
    (folder / "a" / "notes.png").write_text("not an image")


def make_truncated(folder: Path) -> None:
    save_letters(folder / "a", ["1.png", "2.png", "3.png"])
    for name in ("1.png", "3.png"):
        path = folder / "a" / name
        path.write_bytes(path.read_bytes()[:-60])


def make_blank(folder: Path) -> None:
    (folder / "a").mkdir(parents=True)
    Image.new("L", (20, 20), 90).save(folder / "a" / "blank.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_nothing, "there is no folder .*chars"),
        (make_file, "chars is not a folder"),
        (lambda folder: folder.mkdir(), "chars holds no pictures: it should"),
        (make_flat, "chars holds no class folders"),
        (make_empty_class, "class folder .*b holds no pictures"),
        (make_mixed, "both folders and files .stray.png"),
        (make_text, "notes.png cannot be read as an image"),
        (make_truncated, "1.png cannot be read as an image.*3.png cannot be read as an image.*take away"),
        (make_blank, "blank.png has one colour only"),
        (lambda folder: (folder / "a" / "deeper").mkdir(parents=True), "deeper cannot be read as an image"),
    ],
)
def test_folders_that_cannot_be_used(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    make(tmp_path / "chars")
    with pytest.raises(DataError, match=message):
        folder_of_classes(tmp_path / "chars", read)


def test_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*gone\.png"):
        read(tmp_path / "gone.png")


# downloads

CONTENT = b"all of it" * 1000


class Files(BaseHTTPRequestHandler):
    """Serves CONTENT at /whole, breaks off at /half, at /pieces goes on where it is asked to, and has nothing else."""

    def do_GET(self) -> None:
        if self.path not in ("/whole", "/half", "/pieces"):
            self.send_error(404)
            return
        asked = self.headers.get("Range") if self.path == "/pieces" else None
        rest = CONTENT[int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0 :]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: {"/whole": None, "/half": 1000, "/pieces": 2500}[self.path]])

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the tests' output clean."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Files) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


MD5 = hashlib.md5(CONTENT).hexdigest()


def test_download(server: str, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.zip"
    download(f"{server}/whole", target, MD5)
    assert target.read_bytes() == CONTENT and list(target.parent.iterdir()) == [target]


def test_a_download_goes_on_where_it_broke_off(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download(f"{server}/pieces", tmp_path / "file.zip", MD5)
    assert (tmp_path / "file.zip").read_bytes() == CONTENT
    monkeypatch.setattr(files, "_CONNECTIONS", 2)
    with pytest.raises(DataError, match="broke off after 5000 of 9000 bytes"):
        download(f"{server}/pieces", tmp_path / "other.zip", MD5)
    assert not (tmp_path / "other.zip").exists()


@pytest.mark.parametrize(
    ("url", "md5", "message"),
    [
        ("{server}/whole", "0" * 32, f"has the checksum {MD5} and not 0000"),
        ("{server}/half", MD5, "broke off after 1000 of 9000 bytes"),
        ("{server}/none", MD5, "cannot download .*404.*by hand"),
        ("http://127.0.0.1:1/whole", MD5, "cannot download .*refused"),
        ("nonsense", MD5, "cannot download nonsense"),
    ],
)
def test_download_that_fails_leaves_nothing(server: str, url: str, md5: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        download(url.format(server=server), tmp_path / "file.zip", md5)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_download_to_where_nothing_can_be_written(server: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        download(f"{server}/whole", tmp_path / "file" / "x.zip", MD5)
