import logging

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from vitrify.data import load_dataset
from vitrify.data.image import read_image
from vitrify.errors import InputError


def write(path, value=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (6, 4), value).save(path)
    return path


def grey_level(sample):
    """The first pixel tells which file an item came from."""
    return np.asarray(sample[0]).flat[0].item(), sample[1]


def to_level(image):
    return np.asarray(image).flat[0].item()


def test_imagenet_layout_numbers_classes_as_in_train(tmp_path):
    for name, value in [("train/cat/a.png", 1), ("train/dog/a.png", 2), ("train/eel/x/a.png", 3), ("val/eel/b.png", 4)]:
        write(tmp_path / name, (value,) * 3)
    write(tmp_path / "train/.cache/a.png")
    write(tmp_path / "train/cat/.thumbnails/a.png")
    train, val = load_dataset(tmp_path, "train"), load_dataset(str(tmp_path), "val")
    assert [grey_level(sample) for sample in train] == [(1, 0), (2, 1), (3, 2)]
    assert [grey_level(sample) for sample in val] == [(4, 2)]
    assert train.classes == val.classes == ["cat", "dog", "eel"]
    assert train.labelled
    assert train.source == f"{tmp_path / 'train'}: 3 images, 3 classes"
    assert load_dataset(tmp_path, "test").source == val.source  # val stands in for test


def test_classes_without_splits_say_so(tmp_path):
    write(tmp_path / "cat/a.png")
    write(tmp_path / "dog/a.JPEG")
    data = load_dataset(tmp_path, "test")
    assert [label for _, label in data] == [0, 1]
    assert "2 images, 2 classes; not split: the same images" in data.source


def test_flat_folder_is_unlabelled(tmp_path):
    write(tmp_path / "b.png", (2, 2, 2))
    write(tmp_path / "a.png", (1, 1, 1))
    (tmp_path / "readme.txt").write_text("not an image")
    data = load_dataset(tmp_path, "train")
    assert [grey_level(sample) for sample in data] == [(1, -1), (2, -1)]
    assert (data.labelled, data.classes) == (False, [])
    assert "2 images, unlabelled" in data.source


@pytest.mark.parametrize(
    ("files", "split", "complaint"),
    [
        ([], "train", "no images in .*looked for .jpg"),
        (["notes.txt"], "train", "no images in"),
        (["train/cat/a.png"], "val", r"has no val/ or .* for the split 'val'; it has train/"),
        (["cat/a.png", "stray.png"], "train", r"both images \(stray.png\) and folders \(cat/\)"),
        (["cat/a.png", "dog/notes.txt"], "train", "class folder .*dog holds no images"),
        (["train/cat/a.png", "val/cow/a.png"], "val", "classes that .*train lacks: cow"),
        (["bus/a.png", "train/a.png"], "train", r"has train/, which name splits, beside other folders .*: bus/\. "),
        (["train/cat/a.png", "val/cat/a.png", "old/cat/a.png"], "val", r"has train/, val/, .* with images: old/\. "),
        (["a.png"], "trian", "unknown split 'trian': did you mean 'train'"),
    ],
)
def test_mistakes_are_named(tmp_path, files, split, complaint):
    for name in files:
        path = tmp_path / name
        if path.suffix == ".txt":
            path.parent.mkdir(exist_ok=True)
            path.write_text("x")
        else:
            write(path)
    with pytest.raises(InputError, match=complaint):
        load_dataset(tmp_path, split)


def test_missing_folder_file_and_bad_on_error(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_dataset(tmp_path / "absent", "train")
    with pytest.raises(InputError, match="is a file"):
        load_dataset(write(tmp_path / "a.png"), "train")
    with pytest.raises(InputError, match="unknown on_error 'skp': did you mean 'skip'"):
        load_dataset(tmp_path, "train", on_error="skp")


def test_unlistable_folder_is_bad_input(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(tmp_path), "iterdir", refuse)
    with pytest.raises(InputError, match=r"cannot list the folder .*Permission denied"):
        load_dataset(tmp_path, "train")


@pytest.fixture
def damaged(tmp_path):
    """a and d are fine, b is truncated, c is text."""
    write(tmp_path / "a.png", (1, 1, 1))
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:4000])
    (tmp_path / "c.jpg").write_text("not an image")
    write(tmp_path / "d.png", (4, 4, 4))
    return tmp_path


def test_damaged_images_raise_with_path_and_reason(damaged):
    data = load_dataset(damaged, "train")
    assert grey_level(data[0]) == (1, -1)
    with pytest.raises(InputError, match=r"cannot read image .*b\.png: OSError: .*truncated"):
        data[1]
    with pytest.raises(InputError, match=r"cannot read image .*c\.jpg: UnidentifiedImageError"):
        data[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_skipped_counted_and_logged_once(damaged, workers, caplog):
    data = load_dataset(damaged, "train", transform=to_level, on_error="skip")
    assert data.skipped == []
    loader = DataLoader(data, batch_size=2, num_workers=workers)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert [level for levels, _ in loader for level in levels.tolist()] == [1, 4, 4, 4]
    assert [path.rsplit("/", 1)[-1] for path, _ in data.skipped] == ["b.png", "c.jpg"]
    assert "truncated" in data.skipped[0][1]
    if workers == 0:  # a worker logs in its own process
        assert len(caplog.records) == 2
        assert "b.png" in caplog.text


def test_selecting_leaves_out_what_cannot_be_read(damaged):
    data = load_dataset(damaged, "test", transform=to_level, on_error="skip")
    data.select(range(3, -1, -1))
    assert [level for level, _ in data] == [4, 1]
    assert [path.rsplit("/", 1)[-1] for path, _ in data.skipped] == ["c.jpg", "b.png"]
    assert "truncated" in data.skipped[1][1]


def test_selecting_reads_nothing_where_a_bad_image_is_an_error(damaged):
    data = load_dataset(damaged, "test", on_error="raise")
    data.select([0, 1])
    assert grey_level(data[0]) == (1, -1)
    with pytest.raises(InputError, match=r"b\.png"):
        data[1]


def test_selecting_only_unreadable_images_fails(damaged):
    with pytest.raises(InputError, match=r"none of the 2 images chosen .* can be read"):
        load_dataset(damaged, "test", on_error="skip").select([1, 2])


def test_folders_without_images_may_lie_beside_splits(tmp_path):
    write(tmp_path / "train/cat/a.png")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "list.txt").write_text("x")
    assert load_dataset(tmp_path, "train").classes == ["cat"]


def test_last_image_damaged_wraps_around_and_none_readable_fails(damaged):
    (damaged / "d.png").write_bytes(b"")
    data = load_dataset(damaged, "train", on_error="skip")
    assert grey_level(data[3]) == (1, -1)
    (damaged / "a.png").unlink()
    with pytest.raises(InputError, match="none of the 4 images"):
        data[0]


def test_negative_and_out_of_range_indices(tmp_path):
    data = load_dataset(write(tmp_path / "a.png").parent, "train")
    assert data[-1][1] == -1
    with pytest.raises(IndexError):
        data[1]


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 100, ("L", 100)),
        ("1", 1, ("L", 255)),
        ("LA", (100, 0), ("L", 100)),
        ("I;16", 25700, ("L", 100)),
        ("RGB", (1, 2, 3), ("RGB", (1, 2, 3))),
        ("RGBA", (1, 2, 3, 0), ("RGB", (1, 2, 3))),
    ],
)
def test_png_modes(tmp_path, mode, value, expected):
    image = read_image(write(tmp_path / "x.png", value, mode))
    assert (image.mode, image.getpixel((0, 0))) == expected


def test_palette_with_transparency(tmp_path, recwarn):
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "x.png", transparency=bytes([0, 128]))
    read = read_image(tmp_path / "x.png")
    assert (read.mode, read.getpixel((0, 0))) == ("RGB", (10, 20, 30))
    assert not recwarn.list


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    image = read_image(write(tmp_path / "x.jpg", (0, 0, 0, 0), "CMYK"))
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", (255, 255, 255))


def test_pixels_without_a_range_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"x\.tiff.*floating-point"):
        read_image(write(tmp_path / "x.tiff", 0.5, "F"))
    with pytest.raises(InputError, match=r"y\.tiff.*at most 16 bits"):
        read_image(write(tmp_path / "y.tiff", 70000, "I"))


def test_exif_orientation_turns_the_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: rotate by 270 degrees
    Image.new("RGB", (6, 4)).save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").size == (4, 6)
